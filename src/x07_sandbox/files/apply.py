"""Atomic application of a change set: a kill at any point leaves the old tree or the new one.

After all checks, new content is written to staging folders beside the old content, and a journal records the steps.
Then names change one by one. Each replaced or removed inode is compared again and saved for undo. Renaming the journal
commits. Each set has a private folder, which holds the journal (files/journal) while there is something to roll back or
finish. It also holds `undo/changes.json` and `undo/data`, the undo set of the last application.
"""

import contextlib
import errno
import functools
import os
import posixpath
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final, NamedTuple

from x07_sandbox.errors import Flag, HostError, Text, escaped
from x07_sandbox.files import journal, staging
from x07_sandbox.files.changes import STAGING, ChangeSet, RootChanges, path_of
from x07_sandbox.files.checks import RootState, check_set, compare_root, is_there, root_anchor, with_actual_modes
from x07_sandbox.files.inode import MISSING, ConflictError, conflict_error
from x07_sandbox.files.journal import Head, Place, Site, Step
from x07_sandbox.files.protected import completed_repository, why_repository
from x07_sandbox.files.staging import Planner, fill, undo_changes
from x07_sandbox.host import beneath, linux, settings
from x07_sandbox.host.locks import OnWait, lock_fd_held
from x07_sandbox.host.paths import closing_fd, private_dir
from x07_sandbox.host.processes import close_on_fork

__all__ = ["ConflictError", "apply", "recover"]

_PROBE_MODE: Final = 0o710  # a mode that no file system reports by default
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FIXES: Final[dict[int, Text]] = {
    errno.ENOSPC: "Free disk space",
    errno.EDQUOT: "Free disk space",
    errno.EROFS: "Mount that file system writable",
    errno.EACCES: "Apply the changes as a user who may write to that folder",
    errno.EPERM: "Apply the changes as the owner of the files and a member of their groups",
    errno.EXDEV: ("Unmount that file system, grant it as a separate folder, or add ", Flag("--skip")),
    errno.EBUSY: "Unmount that file system",
    errno.ENOSYS: "Use Linux 5.6 or newer, without a seccomp filter that blocks openat2",
}


class _Inverse(NamedTuple):
    """The changes that undo those of one root. site, prefix: the root's anchor (root_anchor), and its name there."""

    root: RootChanges
    site: Site
    prefix: str


def apply(
    changes: ChangeSet,
    data_fd: int,
    folder: Path,
    *,
    on_wait: OnWait | None = None,
    around: AbstractContextManager[None] | None = None,
) -> ChangeSet:
    """Apply a change set to the host. Return the undo set, which is empty if all changes were already in effect.

    data_fd: descriptor of the file with the contents.
    folder: the private folder of the set; it is created if missing. No undo set is saved if its name is UNDOING.
    on_wait: called with a path before the call waits for a lock; an exception from what it returns ends the call.
    around: a context that is entered once the folder is locked and recovered.
    Raises ValueError for an invalid set, ConflictError, HostError. After an error nothing has changed, unless the
    rollback failed too. recover() retries the rollback.
    """
    check_set(changes)
    with _locked(folder, on_wait), around or contextlib.nullcontext():
        _recover(folder, on_wait)
        with _os_errors(folder):
            return _apply(changes, data_fd, folder, on_wait)


def recover(folder: Path, *, on_wait: OnWait | None = None) -> None:
    """Roll back or finish the change set of *folder* if its application was killed. Raises HostError."""
    if not folder.exists():
        return
    with _locked(folder, on_wait):
        _recover(folder, on_wait)


def _apply(changes: ChangeSet, data_fd: int, folder: Path, on_wait: OnWait | None) -> ChangeSet:
    roots = [root for root in changes.roots if root.changes]
    anchors = [root_anchor(root) for root in roots]
    with _sites((path for path, _ in anchors), on_wait) as by_path:
        applied = staging.undo_entries(folder)
        states = [
            compare_root(root, by_path[path].fd, prefix, applied)
            for root, (path, prefix) in zip(roots, anchors, strict=True)
        ]
        if all(state.all_applied for state in states):
            nothing = ChangeSet(run=changes.run, roots=())
            staging.drop_prepared(folder)
            staging.publish_empty(folder, nothing)
            return nothing
        conflicts = list(dict.fromkeys(name for state in states for name in state.conflicts))
        if applied:
            _check_part(changes.run, set(applied), list(zip(roots, states, strict=True)), conflicts)
        if conflicts:
            raise conflict_error(conflicts)
        if folder.name != staging.UNDOING:  # an undo only restores what was there
            for root, (path, prefix) in zip(roots, anchors, strict=True):
                _check_repositories(root, by_path[path].fd, prefix)
        sites = list({id(site): site for site in by_path.values()}.values())
        planner = Planner(data_fd)
        inverse: list[_Inverse] = []
        for root, state, (path, prefix) in zip(roots, states, anchors, strict=True):
            first = len(planner.steps)
            planner.add(next(i for i, site in enumerate(sites) if site is by_path[path]), state.items)
            undo = tuple(undo_changes(state.items, planner.steps[first:]))
            undo_root = RootChanges(root=root.root, guest=root.guest, missing=False, changes=undo)
            inverse.append(_Inverse(undo_root, by_path[path], prefix))
        head = Head(run=changes.run, places=tuple(site.place for site in sites))
        return _execute(folder, head, sites, planner, inverse)


def _check_part(
    run: str, applied: set[tuple[str, str]], compared: list[tuple[RootChanges, RootState]], conflicts: list[str]
) -> None:
    """Raise ConflictError if another part of the same changes is already applied.

    Applying a second part would discard the undo set of the first part. That is allowed only if all names in that undo
    set have their old content again.
    """
    mine = {(root.root, item.change.name) for root, state in compared for item in state.items}
    done = {(root.root, name) for root, state in compared for name in state.applied}
    done |= {(root.root, "") for root, _ in compared if root.missing and (root.root, "") in applied}
    done_paths = {posixpath.join(*name).rstrip("/") for name in done}
    if done_paths.issuperset(conflicts) if conflicts else not applied <= mine:
        why = "another part of them is already applied, and one x07 undo cannot revert both"
        fix = f"Run x07 undo {run} first, then apply all the parts that you want in one command"
        raise ConflictError("cannot apply the changes", why, fix)


def _check_repositories(root: RootChanges, dir_fd: int, prefix: str) -> None:
    """Raise ConflictError if the host has parts of a git repository now that *root* would complete or write in."""
    folder = completed_repository(root, functools.partial(is_there, dir_fd, prefix))
    if folder is not None:
        where = why_repository(escaped(path_of(root.root, folder)))
        why = f"with files that came after the run had copied the folder, {where}"
        raise ConflictError("cannot apply the changes", why, "Run the program again")


def _execute(folder: Path, head: Head, sites: list[Site], planner: Planner, inverse: list[_Inverse]) -> ChangeSet:
    """Carry out the planned steps and return the undo set."""
    steps, started = planner.steps, 0
    try:
        journal.write(folder, "staging", head)
        for site in sites:
            _make_staging(site)
            # Another set may have removed the folder as part of an outer root. From here on that set would find our
            # staging folder in it.
            _check_unmoved(site.place.path, site, None)
        journal.write(folder, "staging", head)
        for index, site in enumerate(sites):
            fill(site, (step for step in steps if step.place == index), planner)
        journal.write(folder, "journal", head, steps)
        for number, step in enumerate(steps, start=1):
            journal.check_step(sites[step.place], step)
            started = number
            journal.apply_step(sites[step.place], step)
        for site in sites:
            linux.sync(site.fd)
        roots = (
            one.root if one.site.keeps_modes else with_actual_modes(one.root, one.site.fd, one.prefix)
            for one in inverse
        )
        undo_set = ChangeSet(run=head.run, roots=tuple(roots))
        if folder.name != staging.UNDOING:
            staging.prepare(folder, undo_set)
            staging.save_displaced(folder, sites, steps)
        journal.commit(folder)
    except BaseException:
        # An interrupt may arrive right after the commit.
        if not journal.committed(folder):
            _roll_back(sites, steps[:started])
            _remove_new(folder, sites, steps if started else None)
        raise
    _finish(folder, sites, steps)
    return undo_set


def _make_staging(site: Site) -> None:
    try:
        os.mkdir(site.place.staging, 0o700, dir_fd=site.fd)
    except FileNotFoundError as exc:  # the folder itself was removed since we opened it
        raise _moved(site.place.path, None) from exc
    except OSError as exc:
        exc.filename = site.place.path  # the name of a staging folder would mean nothing to the user
        raise
    site.staging_fd = os.open(site.place.staging, _FOLDER, dir_fd=site.fd)
    info = os.fstat(site.staging_fd)
    site.place.staged = (info.st_dev, info.st_ino)
    with contextlib.suppress(OSError):
        os.fchmod(site.staging_fd, _PROBE_MODE)
    site.keeps_modes = os.fstat(site.staging_fd).st_mode & 0o777 == _PROBE_MODE
    if site.keeps_modes:
        os.fchmod(site.staging_fd, 0o700)
        site.keeps_modes = os.fstat(site.staging_fd).st_mode & 0o777 == 0o700  # noqa: PLR2004


def _roll_back(sites: list[Site], started: list[Step], *, recovering: bool = False) -> None:
    """Undo the started steps, last one first. Retry for SETTLE_S seconds while something blocks a step.

    recovering: ignore steps that cannot be undone and have not replaced or removed anything.
    """
    for site in sites:
        if site.staging_fd < 0:  # interrupted right after the folder was made
            _open_staging(site)
    until = time.monotonic() + settings.SETTLE_S
    todo = [step for step in reversed(started) if sites[step.place].staging_fd >= 0]
    while todo := [step for step in todo if not journal.undo_step(sites[step.place], step)]:
        if time.monotonic() > until:
            break
        time.sleep(0.01)
    if stuck := [step for step in todo if not recovering or journal.holds_displaced(sites[step.place], step)]:
        names = ", ".join(ascii(sites[step.place].path(step.name)) for step in stuck[:5])
        saved = ", ".join(ascii(sites[index].path(sites[index].place.staging)) for index in {s.place for s in stuck})
        why = f"{names} cannot be restored, because files were moved; the earlier content is in {saved}"
        raise HostError("cannot undo the changes", why, "Move these files back or away, then try again")


def _remove_new(folder: Path, sites: list[Site], steps: list[Step] | None) -> None:
    """Remove the staged content. steps: None before the first step; every entry named like a slot is then new."""
    for index, site in enumerate(sites):
        # Nothing is staged before the journal names the staging folder.
        known = journal.staged_inodes(steps, index) if steps is not None else None if site.place.staged else {}
        staging.remove_staging(site, known)
    _end(folder)


def _finish(folder: Path, sites: list[Site], steps: list[Step]) -> None:
    staging.publish(folder)
    for index, site in enumerate(sites):
        last = [step for step in steps if step.place == index and step.kind == "mode" and step.name == "."]
        staging.remove_staging(site, journal.displaced_inodes(steps, index), last[-1].new_mode if last else None)
    _end(folder)


def _end(folder: Path) -> None:
    journal.remove(folder)
    staging.drop_prepared(folder)


def _recover(folder: Path, on_wait: OnWait | None) -> None:
    with _os_errors(folder):
        found = journal.read(folder)
        if found is None:
            _end(folder)
            return
        phase, head, steps = found
        places = {place.path: place for place in head.places}
        with _sites(places, on_wait, places) as by_path:
            sites = [by_path[place.path] for place in head.places]
            for site in sites:
                _open_staging(site)
            if phase == "committed":
                _finish(folder, sites, steps)
            else:
                _roll_back(sites, steps, recovering=True)
                _remove_new(folder, sites, steps if phase == "journal" else None)


def _open_staging(site: Site) -> None:
    """Open the staging folder of a site. Leave staging_fd at -1 if the folder is missing or is not the recorded one."""
    try:
        fd = os.open(site.place.staging, _FOLDER, dir_fd=site.fd)
    except OSError as exc:
        if exc.errno not in MISSING:
            raise
        return
    info = os.fstat(fd)
    if site.place.staged in {None, (info.st_dev, info.st_ino)}:
        site.staging_fd = fd
    else:
        os.close(fd)


@contextlib.contextmanager
def _sites(
    paths: Iterable[str], on_wait: OnWait | None, recorded: dict[str, Place] | None = None
) -> Iterator[dict[str, Site]]:
    """Open the folders, lock them in the order of their inodes, and yield them by path. recorded: from the journal."""
    with contextlib.ExitStack() as stack:
        by_path: dict[str, Site] = {}
        by_ident: dict[tuple[int, int], Site] = {}
        for path in sorted(set(paths)):
            try:
                fd = beneath.open_root(path)
            except OSError as exc:
                if exc.errno not in MISSING:
                    exc.filename = path
                    raise
                raise _moved(path, recorded) from exc
            stack.callback(close_on_fork.close, close_on_fork.add(fd))  # a copy in a forked child would keep the lock
            info = os.fstat(fd)
            ident = (info.st_dev, info.st_ino)
            if recorded is not None and recorded[path].ident != ident:
                raise _moved(path, recorded)
            if ident not in by_ident:
                place = Place(path=path, ident=ident, staging=STAGING + secrets.token_hex(8))
                by_ident[ident] = Site(place=recorded[path] if recorded else place, fd=fd)
            by_path[path] = by_ident[ident]
        for _, site in sorted(by_ident.items()):
            notify = None if on_wait is None else (lambda path=site.place.path: on_wait(path))
            stack.enter_context(lock_fd_held(os.dup(site.fd), on_wait=notify))
            stack.callback(_close_staging, site)
        for path, site in by_path.items():
            _check_unmoved(path, site, recorded)
        yield by_path


def _close_staging(site: Site) -> None:
    if site.staging_fd >= 0:
        os.close(site.staging_fd)
        site.staging_fd = -1


def _check_unmoved(path: str, site: Site, recorded: dict[str, Place] | None) -> None:
    try:
        fd = beneath.open_root(path)
    except OSError as exc:
        raise _moved(path, recorded) from exc
    with closing_fd(fd):
        info = os.fstat(fd)
    if (info.st_dev, info.st_ino) != site.place.ident:
        raise _moved(path, recorded)


def _moved(path: str, recorded: dict[str, Place] | None) -> Exception:
    if recorded is None:
        return conflict_error([path])
    why = f"{path!a} is not the folder that the journal recorded, or a link leads to it"
    staging = recorded[path].staging
    fix = f"Move that folder back. Or save the files that you need from {staging} in it, then remove the journal"
    return HostError("cannot recover the changes", why, fix)


@contextlib.contextmanager
def _locked(folder: Path, on_wait: OnWait | None) -> Iterator[None]:
    private_dir(folder)
    notify = None if on_wait is None else (lambda: on_wait(str(folder)))
    with _os_errors(folder), lock_fd_held(os.open(folder, _FOLDER), on_wait=notify):
        yield


@contextlib.contextmanager
def _os_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        place = exc.filename if isinstance(exc.filename, str) else os.fspath(exc.filename or folder)
        why = f"{exc.strerror or exc} ({place!a})"
        fix = _FIXES.get(exc.errno or 0, "Correct the problem, then try again")
        raise HostError("cannot apply the changes", why, fix) from exc
