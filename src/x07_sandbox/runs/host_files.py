"""The host's files of one run: copied in before it, and what the program changed of them after it."""

from __future__ import annotations

import glob
import os
import posixpath
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from x07_sandbox.backends.base import RootPlace
from x07_sandbox.channel.frames import Stream
from x07_sandbox.errors import BackendError, HostError, RefusedError
from x07_sandbox.files.changes import ChangeSet, RootChanges, called, encode, folders_above, shown
from x07_sandbox.files.collisions import collisions, knows_no_case
from x07_sandbox.files.copy import FIELDS, NUMBER_MAX, LeftOut, bounds_of, copy_tree, value_for, why_left_out
from x07_sandbox.files.incoming import Incoming
from x07_sandbox.files.judge import Allowed, judge
from x07_sandbox.files.protected import Protection, repository_around
from x07_sandbox.files.roots import Root, change_roots, mounts_of, roots_of, trees_of
from x07_sandbox.host import settings
from x07_sandbox.host.paths import cache_dir, is_folder, one_slash, open_own, private_dir, real_path, state_dir
from x07_sandbox.jobs.record import home_of
from x07_sandbox.plan.confinement import confinement
from x07_sandbox.plan.denials import Area, Denial, HowToAllow
from x07_sandbox.plan.places import OUT, PROGRAM
from x07_sandbox.programs.toolchains import PROJECT_FOLDER
from x07_sandbox.runs.folder import runs_dir
from x07_sandbox.runs.request import ProjectPolicy
from x07_sandbox.runs.result import ChangedName, Changes
from x07_sandbox.runs.streams import ROOM, InFile

if TYPE_CHECKING:
    import contextlib

    from x07_sandbox.files.changes import Refused
    from x07_sandbox.files.copy import Bounds, Copied, Reason
    from x07_sandbox.files.roots import Mount, Tree
    from x07_sandbox.policy.model import Policy
    from x07_sandbox.runs.folder import RunFolder
    from x07_sandbox.runs.program import Program
    from x07_sandbox.runs.request import RunRequest

_T = TypeVar("_T")
_NAMES_MAX: Final = 1000  # of a result, but for deletions; all are in the run's folder
_DENIALS_MAX: Final = 100
_LINKS_MAX: Final = 40  # path_resolution(7): the kernel follows no more


class HostFiles:
    """The host's files of one run: copied in before its machine starts, settled after it has ended."""

    def __init__(
        self, request: RunRequest, program: Program, policy: Policy, folder: RunFolder, stack: contextlib.ExitStack
    ) -> None:
        """Copy in. Raises SandboxError: EntriesError, of which too_many() tells."""
        self._request = request
        self._policy = policy
        self._place = folder.path / "changes"
        self._bounds = bounds_of(policy, request.hide, request.reveal)
        roots = roots_in_force(request, program, policy)
        self.trees: list[Tree] = []
        self.copied: list[Copied] = []
        self.files: list[InFile] = []
        left = settings.COPY_IN_MAX_BYTES
        joins: dict[str, HowToAllow] = {}
        waiting = list(trees_of(roots))
        while waiting:
            tree = waiting.pop(0)
            request.progress(f"copying {tree.host} in")
            copied = self._copy(tree, left, folder)
            left -= copied.size
            apart = {mount.host for mount in copied.apart}
            mounts = tuple(mount for mount in tree.mounts if mount.host not in apart)
            self.trees.append(msgspec.structs.replace(tree, mounts=mounts))
            joins |= {mount.at: how for mount in copied.apart if (how := self._joining(copied, mount))}
            # What lies in another root, and that did not take it along.
            waiting += trees_of([root for root in roots if root.host in apart])
        writable = change_roots(self.trees)
        self._mounts = mounts_of(self.trees, confinement(policy, _start(program)))
        given = {root.guest: root.given for root in roots}
        # What is in force: of what lies in a write root all can be written, whatever else names it.
        self.areas = [
            Area(given=given[mount.at], at=mount.at, write=mount.write, joins=joins.get(mount.at))
            for _, mount in self._mounts
        ]
        self._roots = [one for one in self._mounts if one in writable]
        self._moded: list[str] = []  # roots that were given another mode
        self.incoming: Incoming | None = None
        if self._roots and request.changes != "discard":
            private_dir(self._place)
            data_fd = open_own(self._place / "data", os.O_RDWR | os.O_EXCL)
            stack.callback(os.close, data_fd)
            entries = self._bounds.entries + sum(len(copied.nodes) for copied in self.copied)
            most_bytes = settings.CHANGES_MAX_BYTES
            self.incoming = Incoming(data_fd, roots=len(self._roots), most_entries=entries, most_bytes=most_bytes)

    def _copy(self, tree: Tree, left: int, folder: RunFolder) -> Copied:
        packed = folder.out_file(f"tree {len(self.trees)}", 1 << 60)
        try:
            with os.fdopen(os.dup(packed.fd), "wb") as out:
                copied = copy_tree(tree, self._bounds, out, left)
                size = out.tell()
        except OSError as exc:
            raise HostError("cannot keep a copy of the program's files", exc.strerror or str(exc), ROOM) from exc
        self.copied.append(copied)
        self.files.append(InFile(path=tree.host, mode=0, kind="tree", fd=packed.fd, size=size))
        return copied

    def _joining(self, copied: Copied, mount: Mount) -> HowToAllow | None:
        """What would have let it travel with the tree that left it, or a folder around it, out."""
        for name in {mount.sub} | folders_above([mount.sub]):
            if (stayed := copied.stayed.get(name)) is not None:
                how = _to_let_in(stayed.reason, LeftOut(names=[name], most=stayed.most), self._bounds)
                return _denial(FIELDS[stayed.reason], "", "", "", 1, how).how_to_allow
        return None

    def mounts(self, first: int) -> list[dict[str, Any]]:
        """Where they go, as START has it. first: number of the first tree among the files of START."""
        return [
            {
                "tree": Stream.FIRST_FILE + first + number,
                "sub": mount.sub,
                "at": mount.at,
                "write": mount.write,
                "changes": self.incoming is not None and (number, mount) in self._roots,
            }
            for number, mount in self._mounts
        ]

    def places(self) -> tuple[RootPlace, ...]:
        """The folders that these are in the program's view, outer ones first; of a file, the folder around it."""
        found: dict[str, bool] = {}
        for _, mount in self._mounts:
            at = posixpath.dirname(mount.at) if mount.single else mount.at
            found[at] = mount.write or found.get(at, False)
        return tuple(RootPlace(at=at, write=write) for at, write in sorted(found.items()))

    # what was left out

    def denials(self) -> list[Denial]:
        """What was not copied in, one entry a reason."""
        found = []
        for copied in self.copied:
            for reason, left in copied.left_out.items():
                more = f" and {left.count - len(left.names)} more" if left.count > len(left.names) else ""
                subject = f"{', '.join(map(shown, left.names))}{more}: {why_left_out(reason, self._bounds)}"
                how = _to_let_in(reason, left, self._bounds)
                found.append(_denial(FIELDS[reason], "copy", subject, "copying in", left.count, how))
        return found

    # what came back

    def settle(self, *, ended_well: bool) -> tuple[Changes, list[Denial], str]:
        """Apply or keep the changes: the state, what was refused, and a warning. Raises PeerError, BackendError."""
        changes, refused, warning = self._settle(ended_well=ended_well)
        told = "what may be changed is what lies below a root, so its own mode stays as it was"
        moded = f"{', '.join(self._moded)}: {told}" if self._moded else ""
        return changes, refused, "; ".join(filter(None, (warning, moded)))

    def _settle(self, *, ended_well: bool) -> tuple[Changes, list[Denial], str]:
        incoming = self.incoming
        if incoming is None:
            return Changes(state="discarded" if self._roots else "none"), [], ""
        if not incoming.complete:
            self._forget()
            why = incoming.problem or "its machine ended before they came"
            refused = [too_many(self._policy, "change", why)] if incoming.too_many else []
            return Changes(state="discarded", reason=why), refused, f"the program's changes to files are lost: {why}"
        changes = self._judged(incoming)
        if not any(root.changes or root.refused for root in changes.roots):
            self._forget()
            return Changes(), [], ""
        self._keep(changes)
        if any(root.refused for root in changes.roots):
            every = ((root.root, refusal) for root in changes.roots for refusal in root.refused[:_DENIALS_MAX])
            refused = [_refusal(root, refusal, of_several=changes.of_several) for root, refusal in every]
            return _told(changes, "kept", _why_kept(changes)), refused[:_DENIALS_MAX], ""
        if self._request.changes == "keep" or not ended_well:
            return _told(changes, "kept", "" if ended_well else "the program did not end by itself"), [], ""
        return self._applied(changes)

    def _applied(self, changes: ChangeSet) -> tuple[Changes, list[Denial], str]:
        from x07_sandbox.files.apply import ConflictError
        from x07_sandbox.runs.kept import KeptChanges, do

        kept = KeptChanges(run=changes.run, folder=self._place, changes=changes)
        try:
            do(kept, changes, lambda path: self._request.progress(f"waiting: another command changes {path}"))
        except ConflictError as exc:
            return _told(changes, "conflict", exc.why), [], ""
        except HostError as exc:
            return _told(changes, "kept", f"{exc.what}: {exc.why}"), [], str(exc)
        return _told(changes, "applied", ""), [], ""

    def _judged(self, incoming: Incoming) -> ChangeSet:
        fs = self._policy.fs
        allowed = Allowed(mkdir=fs.allow_mkdir, remove=fs.allow_remove, rename=fs.allow_rename)
        kept = _kept_by_us()
        roots = []
        for number, (tree, mount) in enumerate(self._roots):
            before = _below(self.copied[tree].nodes, mount.sub)
            made = _below(dict.fromkeys(self.copied[tree].made), mount.sub)
            allowed = msgspec.structs.replace(allowed, made=frozenset(made))
            told = [one for one in incoming.told if one.root == number]
            around, let_go = repository_around(mount.host), self._request.allow_protected
            protection = Protection(mount.host, self._own(mount), let_go, repository=around, kept=kept)
            stayed = _below(self.copied[tree].stayed, mount.sub)
            judged = judge(before, stayed, told, self._bounds, allowed, protection)
            if judged.root_mode is not None:
                self._moded.append(f"{shown(mount.host)} was given mode {judged.root_mode:04o}")
            refused = list(judged.refused)
            if judged.changes and knows_no_case(mount.host):
                refused += collisions(judged.changes, {*before, *stayed})
            done, ordered = judged.changes, tuple(sorted(refused, key=lambda refusal: refusal.name))
            host, guest = mount.host, mount.at
            roots.append(RootChanges(root=host, guest=guest, missing=mount.missing, changes=done, refused=ordered))
        return ChangeSet(run=self._place.parent.name, roots=tuple(roots))

    def _own(self, mount: Mount) -> list[str]:
        """Names below a root of what the run itself was told by."""
        policy = self._request.policy
        if not isinstance(policy, (str, Path, ProjectPolicy)):
            return []
        return [
            path.removeprefix(mount.host).lstrip("/")
            for path in sorted(_way_to(str(policy)))
            if path == mount.host or path.startswith(f"{mount.host}/")
        ]

    def _keep(self, changes: ChangeSet) -> None:
        place = self._place / "changes.json"
        try:
            place.write_bytes(encode(changes))
        except OSError as exc:
            place.unlink(missing_ok=True)
            raise BackendError("cannot keep the program's changes", exc.strerror or str(exc), ROOM) from exc

    def _forget(self) -> None:
        (self._place / "data").unlink(missing_ok=True)
        self._place.rmdir()


def base_folder(request: RunRequest, program: Program) -> Path:
    """The folder that relative roots are below: the project's, else ours. Raises UsageError."""
    if program.project and request.program is not None:
        path = Path(request.program)
        return real_path(path if is_folder(path) else path.parent)
    return real_path(Path())


def roots_in_force(request: RunRequest, program: Program, policy: Policy) -> tuple[Root, ...]:
    """The folders of the host that a run opens to its program. Raises RefusedError, UsageError."""
    roots = roots_of(policy, base_folder(request, program), _start(program))
    if request.out is None:
        return roots
    if not policy.fs.enabled:
        fix = "Set fs.enabled to true in it, or leave --out out"
        why = f"fs.enabled is false in policy {policy.policy_id}"
        raise RefusedError("cannot use --out", why, fix).by("fs.enabled", value=True)
    out = one_slash(os.path.normpath(real_path(Path()) / request.out))
    if any(root.guest == OUT for root in roots):
        raise RefusedError("cannot use --out", f"the policy has a root at {OUT}", "Leave one of them out")
    return (*roots, Root(field="--out", given=str(request.out), host=out, guest=OUT, write=True))


def _kept_by_us() -> list[str]:
    """Where our records lie, sets of changes and journals among them, and our cache: all of it is believed later."""
    root = state_dir()
    home = home_of(root)
    places = (root, runs_dir(root), home / "runner_instance", home / "runner_instance.owner", cache_dir())
    return [str(real_path(path)) for path in places]  # as roots are known


def _start(program: Program) -> str:
    """Where it starts in the machine."""
    return PROJECT_FOLDER if program.project else PROGRAM


def _way_to(path: str) -> set[str]:
    """The absolute paths that decide which file *path* is: its real one, and every link on the way to it."""
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


def _told(changes: ChangeSet, state: Any, reason: str) -> Changes:  # noqa: ANN401 - Changes knows its states
    every = [(root.root, change) for root in changes.roots for change in root.changes]
    every.sort(key=lambda one: one[1].action != "deleted")
    deletions = sum(change.action == "deleted" for _, change in every)
    names = tuple(
        ChangedName(root=shown(root), name=shown(change.name), action=change.action)
        for root, change in every[: max(_NAMES_MAX, deletions)]
    )
    counts = {action: changes.count(action) for action in ("added", "changed", "deleted")}
    return Changes(state=state, reason=reason, names=names, **counts)


def _why_kept(changes: ChangeSet) -> str:
    """How many may not be done; what was not even taken is not among the changes that are counted."""
    names = {(root.root, refusal.name) for root in changes.roots for refusal in root.refused}
    counted = {(root.root, change.name) for root in changes.roots for change in root.changes}
    some = [f"{len(names & counted)} of them may not be done"] if names & counted else []
    more = [f"{len(names - counted)} more may not be brought back"] if names - counted else []
    return ", and ".join(some + more)


def too_many(policy: Policy, action: str, subject: str) -> Denial:
    """There were more entries than fs.max_entries, going in ("copy") or coming back ("change")."""
    value = min(2 * bounds_of(policy).entries, NUMBER_MAX)
    by = "copying in" if action == "copy" else "the check of changes"
    return _denial("fs.max_entries", action, subject, by, 1, (value, None))


def _to_let_in(reason: Reason, left: LeftOut, bounds: Bounds) -> tuple[object, str | None]:
    """The field's value, or the flag, that would let in what was left out; None for either that would not do."""
    if reason in {"chosen", "secret"}:
        return None, " ".join(_flag("--reveal", name) for name in dict.fromkeys(Path(name).name for name in left.names))
    return value_for(reason, left.most, bounds), None


def _flag(flag: str, name: str) -> str:
    """*flag* with a pattern for just this name, as a shell takes it; any one character for what cannot be written."""
    pattern = "".join(char if char.isprintable() else "?" for char in glob.escape(name))
    if pattern.startswith("-"):
        pattern = f"[-]{pattern[1:]}"  # else it would be a flag
    return f"{flag} {shlex.quote(pattern)}"


def _refusal(root: str, refused: Refused, *, of_several: bool) -> Denial:
    flag = _flag("--allow-protected", refused.name or Path(root).name) if refused.rule == "protected" else None
    if refused.reveal:
        flag = _flag("--reveal", Path(refused.reveal).name)
    subject = f"{called(root, refused.name, of_several=of_several)}: {refused.why}"
    return _denial(refused.rule, "change", subject, "the check of changes", 1, (refused.value, flag))


def _denial(field: str, action: str, subject: str, by: str, count: int, how: tuple[object, str | None]) -> Denial:
    """how: a value of the policy's field, and a flag; None for either that would not do."""
    json_path = f"$.{field}" if "." in field else None  # the others are no fields: no policy decides them
    value, flag = how
    allow = None if how == (None, None) else HowToAllow(json_path=json_path, value=value, flag=flag)
    return Denial(
        field=field, action=action, subject=subject, enforced_by=by, observed_by="host", count=count, how_to_allow=allow
    )
