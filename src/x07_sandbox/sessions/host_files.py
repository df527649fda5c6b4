"""The host files of one run: copied in before the run; changes are checked and applied after the run."""

from __future__ import annotations

import contextlib
import os
import posixpath
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, TypeVar

import msgspec

from x07_sandbox.backends.base import RootPlace
from x07_sandbox.channel.messages import CWD, OUT, PROJECT_FOLDER, Room
from x07_sandbox.channel.messages import Mount as GuestFolder
from x07_sandbox.errors import (
    BackendError,
    Cancelled,
    Command,
    Flag,
    HostError,
    RefusedError,
    SandboxError,
    Text,
    UsageError,
    escaped,
)
from x07_sandbox.files.change_rules import AllowedActions, check_changes
from x07_sandbox.files.changes import ChangeSet, Commits, RootChanges, encode, parent_folders
from x07_sandbox.files.copy import (
    FIELDS,
    NUMBER_MAX,
    Bounds,
    Copied,
    LeftOut,
    Mount,
    Reason,
    Root,
    Tree,
    bounds_of,
    change_roots,
    copy_tree,
    mounts_of,
    roots_of,
    trees_of,
    value_for,
    why_left_out,
)
from x07_sandbox.files.incoming import Incoming
from x07_sandbox.files.protected import Protection, repository_around, work_trees
from x07_sandbox.host import settings
from x07_sandbox.host.paths import (
    cache_dir,
    closing_fd,
    collapse_leading_slashes,
    is_folder,
    open_private_file,
    private_dir,
    real_path,
    replace_file,
    state_dir,
)
from x07_sandbox.host.waiting import Notice
from x07_sandbox.options import flag_for_file
from x07_sandbox.policy.denials import Denial, GuestMount
from x07_sandbox.policy.guest import WORK
from x07_sandbox.records.runs import runs_dir, state_home
from x07_sandbox.sessions.refusals import apply_command, denial, denials_and_entries, flag_for
from x07_sandbox.sessions.request import Program, ProjectPolicy, RunRequest, is_built_in
from x07_sandbox.sessions.result import Changes, ChangesChoice, LeftOutEntry
from x07_sandbox.sessions.saved_changes import SavedChanges, has_commits, summarize
from x07_sandbox.sessions.transfers import ROOM, InFile, RunFolder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from x07_sandbox.files.incoming import ReportedEntry
    from x07_sandbox.files.repository import History
    from x07_sandbox.host.locks import Pause
    from x07_sandbox.policy.model import Policy
    from x07_sandbox.sessions.prepare import Prepared

_T = TypeVar("_T")
_DENIALS_MAX: Final = 100
_LETS_IN: Final[dict[Reason, str]] = {"hidden": "--allow-hidden", "link": "--allow-symlinks"}
_GIT: Final = ".git"
_HISTORY: Final = "history"
CHANGES: Final = "changes"  # folders of a run
AT_PAUSE: Final = "changes-at-pause"
_GIT_ENTRIES: Final = 200_000  # files in a guest's `.git` that may change
_LISTED: Final = 3
_LINKS_MAX: Final = 40  # path_resolution(7): the kernel follows no more


class SavedFiles(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a fork must know about the host files of a sandbox, whose VM has them.

    policy_file: the path of the policy, or "" if it is no file. head, refs: see `History`; None without a history.
    mounts, roots: each with the number of its tree; roots are those whose changes are wanted.
    """

    policy_file: str
    head: str | None
    refs: dict[str, str]
    bounds: Bounds
    trees: tuple[Tree, ...]
    copied: tuple[Copied, ...]
    mounts: tuple[tuple[int, Mount], ...]
    areas: tuple[GuestMount, ...]
    roots: tuple[tuple[int, Mount], ...]


class HostFiles:
    """The host files of one run: copied in before the VM starts. The changes are applied or saved after its end."""

    files: list[InFile]
    trees: list[Tree]
    copied: list[Copied]
    _history: History | None = None

    def __init__(
        self,
        prepared: Prepared,
        folder: RunFolder,
        stack: contextlib.ExitStack,
        saved: tuple[SavedFiles, Path] | None = None,
    ) -> None:
        """Copy the files for the guest. Raises SandboxError, such as EntriesError for too many entries.

        saved: for a fork, whose VM has them already, what `saved` has returned, and the folder of the snapshot. Its
        changes have the same base.
        """
        self._caller, self._stack = prepared.caller, stack
        self._place = folder.path / CHANGES
        self._request, self._policy = prepared.request, prepared.policy.policy
        self._built_in = is_built_in(self._request.policy)
        self.files = []
        if saved is None:
            self._copy_in(prepared, folder)
        else:
            self._copied_before(*saved)
        self._expect_changes()

    def _copied_before(self, saved: SavedFiles, snapshot: Path) -> None:
        self._policy_file, self._bounds = saved.policy_file, saved.bounds
        self.trees, self.copied, self.areas = [*saved.trees], [*saved.copied], [*saved.areas]
        self._mounts, self._roots = [*saved.mounts], [*saved.roots]
        if saved.head is not None:
            from x07_sandbox.files.repository import History  # few runs get one

            self._history = History(saved.head, saved.refs, self._new_store())
            shutil.copytree(snapshot / _HISTORY, self._history.store)

    def _new_store(self) -> Path:
        store: Path = self._place.parent / _HISTORY
        self._stack.callback(shutil.rmtree, store, ignore_errors=True)
        return store

    def _copy_in(self, prepared: Prepared, folder: RunFolder) -> None:
        request, program, policy = self._request, prepared.program, self._policy
        is_file = isinstance(request.policy, str | Path | ProjectPolicy) and not self._built_in
        self._policy_file = str(real_path(Path()) / str(request.policy)) if is_file else ""
        self._bounds = bounds_of(policy, request.hide, request.reveal)
        roots = effective_roots(request, program, policy)
        self.trees = []
        self.copied = []
        left = settings.COPY_IN_MAX_BYTES
        waiting = list(trees_of(roots))
        while waiting:
            tree = waiting.pop(0)
            self._caller.progress(f"copying {tree.host} into the VM")
            copied = self._copy(tree, left, folder)
            left -= copied.size
            separate = {mount.host for mount in copied.separate}
            mounts = tuple(mount for mount in tree.mounts if mount.host not in separate)
            self.trees.append(msgspec.structs.replace(tree, mounts=mounts))
            # Roots inside another root whose copy does not include them.
            waiting += trees_of([root for root in roots if root.host in separate])
        writable = change_roots(self.trees)
        self._mounts = mounts_of(self.trees)
        given = {root.guest: root.given for root in roots}
        if request.workdir is not None and not prepared.project:
            given[WORK] = "."  # the value that --allow-write-root would need
        self.areas = [
            GuestMount(given=given[mount.at], at=mount.at, write=mount.write, host=mount.host)
            for _, mount in self._mounts
        ]
        self._roots = [one for one in self._mounts if one in writable]

    def _expect_changes(self) -> None:
        self.incoming: Incoming | None = None
        self.cancelled_by: int | None = None  # who cancelled the run before its changes were applied: Cancel.signal
        if self._roots and self._request.changes != "discard":
            private_dir(self._place)
            data_fd = open_private_file(self._place / "data", os.O_RDWR | os.O_EXCL)
            self._stack.callback(os.close, data_fd)
            self.incoming = self._receiver(data_fd)

    def forget(self) -> None:
        """Remove the place for changes, which nobody has asked for yet."""
        if self.incoming is not None:
            self._discard()

    def saved(self, snapshot: Path) -> SavedFiles:
        """Return what a fork needs to know. snapshot: a folder, which gets what a guest's commits refer to."""
        if self._history is not None:
            shutil.copytree(self._history.store, snapshot / _HISTORY)
        return SavedFiles(
            policy_file=self._policy_file,
            head=None if self._history is None else self._history.head,
            refs={} if self._history is None else self._history.refs,
            bounds=self._bounds,
            trees=tuple(self.trees),
            copied=tuple(self.copied),
            mounts=tuple(self._mounts),
            areas=tuple(self.areas),
            roots=tuple(self._roots),
        )

    def _receiver(self, data_fd: int) -> Incoming:
        entries = self._bounds.entries + sum(len(copied.nodes) for copied in self.copied)
        entries += 0 if self._history is None else _GIT_ENTRIES
        most_bytes = settings.CHANGES_MAX_BYTES
        return Incoming(data_fd, roots=len(self._roots), most_entries=entries, most_bytes=most_bytes)

    @contextlib.contextmanager
    def received(self, receive: Callable[[Incoming], object]) -> Iterator[SavedChanges]:
        """Yield the changes of this moment, which are removed afterwards. Raises PeerError, BackendError.

        receive: has the guest send them to the receiver, and waits for their end.
        """
        with tempfile.TemporaryDirectory(dir=self._place.parent, prefix=".changes-") as folder:
            place = Path(folder)
            yield SavedChanges(self._place.parent.name, place, self._so_far(receive, place))

    def save_at_pause(self, receive: Callable[[Incoming], object]) -> None:
        """Save the changes of this moment, for a sandbox that cannot go on later. See `received`."""
        if self.incoming is None:
            return
        self.forget_at_pause()
        place = private_dir(self._place.with_name(AT_PAUSE))
        self._save(self._so_far(receive, place), place)

    def forget_at_pause(self) -> None:
        """Remove what `save_at_pause` has saved."""
        shutil.rmtree(self._place.with_name(AT_PAUSE), ignore_errors=True)

    def _so_far(self, receive: Callable[[Incoming], object], place: Path) -> ChangeSet:
        with closing_fd(open_private_file(place / "data", os.O_RDWR | os.O_EXCL)) as data_fd:
            incoming = self._receiver(data_fd)
            receive(incoming)
            if not incoming.complete:
                why = incoming.problem or "they were not sent"
                raise BackendError("cannot show the changes so far", why, "Close the sandbox with less changes")
            return self._checked(incoming, place, whole=False)

    def _copy_history(self, tree: Tree, out: IO[bytes]) -> Copied:
        """Write a new `.git` instead of the one on the host."""
        from x07_sandbox.files.repository import Repository  # few runs get one

        root = posixpath.dirname(tree.host)
        number, outer = next(one for one in mounts_of(self.trees) if one[1].host == root)
        skipped = _below(self.copied[number].skipped, outer.sub)

        def is_left_out(name: str) -> bool:
            return name in skipped or not skipped.keys().isdisjoint(parent_folders([name]))

        with Repository(root) as repository:
            self._history = repository.copy_history(self._new_store(), out, is_left_out)
        return Copied(size=out.tell())

    def _copy(self, tree: Tree, left: int, folder: RunFolder) -> Copied:
        packed = folder.out_file(f"tree {len(self.trees)}", 1 << 60)
        try:
            with os.fdopen(os.dup(packed.fd), "wb") as out:
                is_history = any(mount.separate and not mount.sub for mount in tree.mounts)
                copied = self._copy_history(tree, out) if is_history else copy_tree(tree, self._bounds, out, left)
                size = out.tell()
        except OSError as exc:
            raise HostError("cannot store a copy of the program's files", exc.strerror or str(exc), ROOM) from exc
        self.copied.append(copied)
        self.files.append(InFile(path="", mode=0, kind="tree", fd=packed.fd, size=size))
        return copied

    def mounts(self, first: int) -> list[GuestFolder]:
        """Return the mounts for the guest. first: index of the first file tree among the session's files."""
        wanted = self._roots if self.incoming is not None else []
        return [
            GuestFolder(first + number, mount.sub, mount.at, mount.write, (number, mount) in wanted)
            for number, mount in self._mounts
        ]

    def room(self) -> Room:
        """Return the room for the contents of changed files."""
        return Room(self._bounds.write_bytes, settings.CHANGES_MAX_BYTES)

    def places(self) -> tuple[RootPlace, ...]:
        """Return the mounted folders, outer ones before inner ones. For a mounted file, return its parent folder."""
        found: dict[str, bool] = {}
        for _, mount in self._mounts:
            at = posixpath.dirname(mount.at) if mount.single else mount.at
            found[at] = mount.write or found.get(at, False)
        return tuple(RootPlace(at=at, write=write) for at, write in sorted(found.items()))

    def denials(self) -> list[Denial]:
        """Return one denial for each reason why entries were not copied in."""
        found = []
        for tree, copied in zip(self.trees, self.copied, strict=True):
            for reason, left in copied.left_out.items():
                if reason == "hidden" and _GIT in left.names and self._is_workdir(tree):
                    found.append(denial("git", "copy", _GIT, "the copy of host files", 1, (None, "--git")))
                    left.largest = [one for one in left.largest if one[1] != _GIT]
                    left.count -= 1
                if not left.count:
                    continue
                more = f" and {left.count - len(left.names)} more" if left.count > len(left.names) else ""
                why = why_left_out(reason, self._bounds)
                links = "; it also contains symbolic links, fs.allow_symlinks" if left.links else ""
                subject = f"{', '.join(map(escaped, left.names))}{more}"
                if reason in {"secret", "chosen"} and self._request.git:
                    why += "; the git history may have it"
                how = _to_let_in(reason, left, self._bounds, built_in=self._built_in)
                denied = denial(FIELDS[reason], "copy", subject, "the copy of host files", left.count, how)
                found.append(msgspec.structs.replace(denied, reason=f"{why}{links}"))
        return found

    def _is_workdir(self, tree: Tree) -> bool:
        return any(mount.at == WORK and not mount.sub for mount in tree.mounts)

    def settle(self, choice: ChangesChoice, why_kept: str) -> tuple[Changes, list[Denial], str]:
        """Apply, save or discard the program's changes to host files. Raises PeerError, BackendError.

        Return a summary of the changes, the denials, and a warning or "". why_kept: why the changes are only saved,
        whatever *choice* is; "" if nothing forbids to apply them.
        """
        incoming = self.incoming
        if incoming is None:
            return Changes(state="discarded" if self._roots else "none"), [], ""
        if choice == "discard":
            self._discard()
            return Changes(state="discarded"), [], ""
        if not incoming.complete:
            self._discard()
            why = incoming.problem or "the run ended before any were sent"
            refused = [too_many(self._policy, "change", why)] if incoming.too_many else []
            return (
                Changes(state="discarded", reason=why),
                refused,
                f"any changes that the program made to files are lost: {why}",
            )
        changes = self._checked(incoming, self._place, whole=choice == "all-or-nothing")
        denials = []
        for branch, why in ({} if changes.commits is None else changes.commits.left_out).items():
            denied = denial("git", "change", f"the commits on {branch}", "the check of commits", 1, (None, None))
            denials.append(msgspec.structs.replace(denied, reason=why))
        if not (has_commits(changes) or any(root.changes or root.left_out or root.refused for root in changes.roots)):
            self._discard()
            return Changes(state="discarded" if denials else "none"), denials, ""
        self._save(changes, self._place)
        of_files, entries = denials_and_entries(changes, built_in=self._built_in)
        denials += of_files[:_DENIALS_MAX]
        if changes.all_or_nothing and (denials or any(root.refused for root in changes.roots)):
            return summarize(changes, "kept", _why_saved(changes)), denials, ""
        settled, warning = self._apply(changes, choice, why_kept)
        return _with_left_out(settled, changes, entries), denials, warning

    def _apply(self, changes: ChangeSet, choice: ChangesChoice, why_kept: str) -> tuple[Changes, str]:
        if why_kept:
            return summarize(changes, "kept", why_kept), ""
        if choice == "keep" or not (any(root.changes for root in changes.roots) or has_commits(changes)):
            return summarize(changes, "kept", ""), ""
        from x07_sandbox.files.apply import ConflictError
        from x07_sandbox.sessions.saved_changes import apply_saved

        saved = SavedChanges(run=changes.run, folder=self._place, changes=changes)
        try:
            self._caller.cancel.check()
            apply_saved(saved, changes, self._on_wait)
        except Cancelled as exc:
            self.cancelled_by = exc.signal
            return summarize(changes, "kept", "the run was cancelled"), ""
        except ConflictError as exc:
            return summarize(changes, "conflict", exc.why), ""
        except HostError as exc:
            return summarize(changes, "kept", f"{exc.what}: {exc.why}"), str(exc)
        return summarize(changes, "applied", ""), ""

    def _on_wait(self, path: str) -> Pause:
        self._caller.progress(Notice(f"waiting: another command is changing {path}"))
        return self._caller.cancel.pause

    def _checked(self, incoming: Incoming, place: Path, *, whole: bool) -> ChangeSet:
        """Return the changes, after all checks. Any commits are stored in the folder *place*."""
        fs = self._policy.fs
        allowed = AllowedActions(mkdir=fs.allow_mkdir, remove=fs.allow_remove, rename=fs.allow_rename)
        reserved = _own_places()
        roots, commits = [], None
        for number, (tree, mount) in enumerate(self._roots):
            reported = [one for one in incoming.reported if one.root == number]
            if mount.separate and self._history is not None:
                commits = self._commits(mount, reported, place)
                continue
            before = _below(self.copied[tree].nodes, mount.sub)
            created = _below(dict.fromkeys(self.copied[tree].created), mount.sub)
            allowed = msgspec.structs.replace(allowed, created=frozenset(created))
            skipped = _below(self.copied[tree].skipped, mount.sub)
            protection = Protection(
                mount.host,
                self._own(mount),
                self._request.allow_protected,
                repository=repository_around(mount.host),
                reserved=reserved,
                work_tree_tops=work_trees([*before, *skipped]),
            )
            checked = check_changes(before, skipped, reported, self._bounds, allowed, protection, split=not whole)
            whole = whole or checked.is_whole
            roots.append(
                RootChanges(
                    root=mount.host,
                    guest=mount.at,
                    missing=mount.missing,
                    changes=checked.changes,
                    refused=checked.refused,
                    left_out=checked.left_out,
                    repositories=checked.repositories,
                )
            )
        every = tuple(map(_joined, roots)) if whole else tuple(roots)
        return ChangeSet(run=self._place.parent.name, roots=every, all_or_nothing=whole, commits=commits)

    def _commits(self, mount: Mount, reported: list[ReportedEntry], place: Path) -> Commits | None:
        from x07_sandbox.files.repository import Repository  # as above

        root = posixpath.dirname(mount.host)
        assert self._history is not None  # the caller has checked it
        try:
            with Repository(root) as repository, closing_fd(open_private_file(place / "data", os.O_RDONLY)) as data_fd:
                return repository.bundle(self._history, reported, data_fd, place)
        except (SandboxError, OSError) as exc:  # the changes of files do not depend on it
            return Commits(
                root=root, left_out={"HEAD": exc.why if isinstance(exc, SandboxError) else str(exc.strerror)}
            )

    def _own(self, mount: Mount) -> list[str]:
        return [
            path.removeprefix(mount.host).lstrip("/")
            for path in sorted(_way_to(self._policy_file) if self._policy_file else ())
            if path == mount.host or path.startswith(f"{mount.host}/")
        ]

    def _save(self, changes: ChangeSet, place: Path) -> None:
        try:
            replace_file(place / "changes.json", encode(changes))
        except OSError as exc:
            raise BackendError("cannot save the program's changes", exc.strerror or str(exc), ROOM) from exc

    def _discard(self) -> None:
        (self._place / "data").unlink(missing_ok=True)
        self._place.rmdir()


def base_folder(request: RunRequest, program: Program | None) -> Path:
    """Return the base of relative roots: the project's folder, --workdir or the current folder. Raises UsageError."""
    if program is not None and program.project and request.program is not None:
        path = Path(request.program)
        return real_path(path if is_folder(path) else path.parent)
    return real_path(Path()) if request.workdir is None else working_folder(request.workdir)


def effective_roots(request: RunRequest, program: Program | None, policy: Policy) -> tuple[Root, ...]:
    """Return the host folders that a run opens to its program. Raises RefusedError, UsageError."""
    start = PROJECT_FOLDER if program is not None and program.project else CWD if request.workdir is None else WORK
    roots = roots_of(policy, base_folder(request, program), start)
    if request.workdir is not None:
        roots = (*roots, workdir_root(request, program, policy, request.workdir))
    if request.git:
        roots = (*roots, _git_root(request))
    if request.out is None:
        return roots
    what = ("cannot use ", Flag("--out"))
    if not policy.fs.enabled:
        fix: Text = ("Set fs.enabled to true in the policy, or remove ", Flag("--out"))
        why = f"fs.enabled is false in policy {policy.policy_id}"
        raise RefusedError(what, why, fix, code="files-disabled").caused_by("fs.enabled", value=True)
    out = collapse_leading_slashes(os.path.normpath(real_path(Path()) / request.out))
    if any(root.guest == OUT for root in roots):
        fix = (f"Remove {OUT} from the policy, or omit ", Flag("--out"))
        raise RefusedError(what, f"the policy already has a folder at {OUT}", fix, code="out-in-policy")
    return (*roots, Root(field="--out", given=str(request.out), host=out, guest=OUT, write=True))


def workdir_root(request: RunRequest, program: Program | None, policy: Policy, workdir: Path) -> Root:
    """Return the root for *workdir*. The program starts in a copy of that folder. Raises RefusedError, UsageError."""
    what = _cannot_use(workdir)
    if program is not None and program.toolchain.protocol is not None:
        roots = ("Use ", Flag("--allow-read-root"), " or ", Flag("--allow-write-root"))
        raise UsageError(what, "an X07 program sees only the folders of its policy", roots)
    if not policy.fs.enabled:
        fix = ("Set fs.enabled to true in the policy, or remove ", Flag("--workdir"))
        why = f"fs.enabled is false in policy {policy.policy_id}"
        raise RefusedError(what, why, fix, code="files-disabled").caused_by("fs.enabled", value=True)
    if policy.fs.deny_hidden and any(part.startswith(".") and part.strip(".") for part in workdir.parts):
        fix = ("Set fs.deny_hidden to false in the policy, or change to that folder and use ", Flag("--workdir ."))
        why = "it is hidden, and fs.deny_hidden is true"
        raise RefusedError(what, why, fix, code="workdir-hidden").caused_by("fs.deny_hidden", value=False)
    host = working_folder(workdir)
    if request.files and (program is None or program.toolchain.build is None):
        why = "`files` are placed in the private working folder, which workdir replaces"
        raise UsageError(what, why, "Write the files to the folder of workdir, or do not use workdir")
    return Root(field="--workdir", given=str(workdir), host=str(host), guest=WORK, write=not request.read_only)


def _git_root(request: RunRequest) -> Root:
    """Return the root for a fresh `.git` in the folder of --workdir. Raises UsageError, RefusedError."""
    from x07_sandbox.files.repository import Repository  # few runs get one

    if request.workdir is None:
        why = "it needs the folder of the repository"
        raise UsageError(("cannot use ", Flag("--git")), why, ("Add ", Flag("--workdir .")))
    host = str(working_folder(request.workdir))
    with Repository(host):  # checks it
        return Root(
            field="--git", given=_GIT, host=f"{host}/{_GIT}", guest=f"{WORK}/{_GIT}", write=not request.read_only
        )


def _cannot_use(workdir: Path) -> Text:
    return "cannot use ", Flag("--workdir"), f" {workdir}"


def working_folder(workdir: Path) -> Path:
    """Return the absolute path of *workdir*. Raises UsageError if the folder is missing or must not be copied."""
    what = _cannot_use(workdir)
    folder = real_path(Path()) / workdir
    if not is_folder(folder):
        command = Command(f"mkdir -p {shlex.quote(escaped(str(workdir)))}")
        raise UsageError(what, "it does not exist", ("To create it: ", command))
    real = real_path(folder)
    home = real_path(Path(os.path.expanduser("~")))  # noqa: PTH111 - Path's own raises where there is none
    if real == home or real in home.parents:
        why = "it is the root of the file system" if real == Path("/") else "it is or contains your home folder"
        raise UsageError(what, f"{why}, and all of it would be copied", "Use the folder of one project")
    own = (*map(Path, ("/proc", "/sys", "/dev")), real_path(state_dir()), real_path(cache_dir()))
    ours = next((place for place in own if real == place or place in real.parents), None)
    if ours is not None:
        why = f"{ours} belongs to the system or contains x07's own records"
        raise UsageError(what, why, "Use the folder of one project")
    return Path(collapse_leading_slashes(os.path.normpath(folder)))


def _own_places() -> list[str]:
    """Return x07's own folders, which no program may change, because x07 trusts the records and caches in them."""
    root = state_dir()
    home = state_home(root)
    places = (root, runs_dir(root), home / "runner_instance", home / "runner_instance.owner", cache_dir())
    return [str(real_path(path)) for path in places]


def _way_to(path: str) -> set[str]:
    """Return the absolute paths that decide which file *path* refers to: its real path and every link on the way."""
    found: set[str] = set()
    here = Path("/") if path.startswith("/") else real_path(Path())
    left = path.split("/")[::-1]
    links = 0
    while left:
        part = left.pop()
        if part == "..":
            here = here.parent
            continue
        here /= part
        if part and links < _LINKS_MAX and here.is_symlink():
            found.add(str(here))
            links += 1
            target = str(here.readlink())
            left += target.split("/")[::-1]
            here = Path("/") if target.startswith("/") else here.parent
    return {*found, str(here)}


def _below(nodes: dict[str, _T], sub: str) -> dict[str, _T]:
    if not sub:
        return nodes
    prefix = f"{sub}/"
    found = {name[len(prefix) :]: node for name, node in nodes.items() if name.startswith(prefix)}
    if sub in nodes:
        found[""] = nodes[sub]
    return found


def _joined(root: RootChanges) -> RootChanges:
    every = sorted((*root.changes, *root.left_out), key=lambda change: change.name)
    return msgspec.structs.replace(root, changes=tuple(every), left_out=())


def _with_left_out(settled: Changes, changes: ChangeSet, entries: tuple[LeftOutEntry, ...]) -> Changes:
    names = {(root.root, one.name) for root in changes.roots for one in root.left_out}
    names |= {(root.root, one.name) for root in changes.roots for one in root.refused}
    return msgspec.structs.replace(
        settled, left_out=len(names), left_out_entries=entries, apply_left_out=apply_command(changes.run, entries)
    )


def _why_saved(changes: ChangeSet) -> str:
    names = {(root.root, refusal.name) for root in changes.roots for refusal in root.refused}
    counted = {(root.root, change.name) for root in changes.roots for change in root.changes}
    refused = len(names & counted)
    left_out = {} if changes.commits is None else changes.commits.left_out
    lost = [f"the commits on {', '.join([*left_out][:_LISTED])} cannot be used"] if left_out else []
    some = [f"{refused} of them {'are' if refused > 1 else 'is'} not allowed"] if refused else []
    more = [f"{len(names - counted)} more cannot be copied back"] if names - counted else []
    return ", ".join(some + more + lost)


def too_many(policy: Policy, action: str, subject: str) -> Denial:
    """Return the denial for exceeding fs.max_entries. action: "copy" for copying in, "change" for reported changes."""
    value = min(2 * bounds_of(policy).entries, NUMBER_MAX)
    by = "the copy of host files" if action == "copy" else "the check of changes"
    return denial("fs.max_entries", action, subject, by, 1, (value, None))


def _to_let_in(reason: Reason, left: LeftOut, bounds: Bounds, *, built_in: bool) -> tuple[object, str | None]:
    if reason in {"chosen", "secret"}:
        names = dict.fromkeys(Path(name).name for name in left.names)
        return None, " ".join(filter(None, (flag_for("--reveal", name) for name in names))) or None
    flags = [_LETS_IN[reason]] if built_in and reason in _LETS_IN else []
    flags += [_LETS_IN["link"]] if flags and left.links else []
    most = left.largest[0][0]
    value = value_for(reason, most, bounds)
    if reason == "large" and built_in and value is not None:
        flags = [flag_for_file(most)]
    return value, " ".join(flags) or None
