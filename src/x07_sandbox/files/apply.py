"""Applying a set of changes on the host, so that a kill at any point leaves the old tree or the new one.

All is checked first. New content is made in a folder of ours beside the old; a journal says what is about to happen;
then names change one by one, and each displaced thing is looked at once more and kept, as a set that undoes this one. A
renamed journal is the mark that all is done. Then what was displaced is removed.

The folder of a set, which is private, holds:

    staging, journal, committed   the journal (files/journal), while something is to be undone or finished
    undo/changes.json, undo/data  the set that undoes the last one applied
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from x07_sandbox.errors import HostError
from x07_sandbox.files import journal
from x07_sandbox.files.apply_steps import Site, displaced, do, holds, ready, staged, undo
from x07_sandbox.files.changes import STAGING, ChangeSet, RootChanges
from x07_sandbox.files.checks import check_set, compare_root, root_anchor, with_actual_modes
from x07_sandbox.files.inode import MISSING, ConflictError, conflict_error
from x07_sandbox.files.journal import Head, Place
from x07_sandbox.files.staging import Planner, fill, undo_changes
from x07_sandbox.files.undo_data import discard, keep, leave, prepare, publish, undoes
from x07_sandbox.host import beneath, close_on_fork, settings
from x07_sandbox.host.locks import opened_lock
from x07_sandbox.host.paths import private_dir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import AbstractContextManager

    from x07_sandbox.files.checks import Found
    from x07_sandbox.files.journal import Step

    OnWait = Callable[[str], None]

__all__ = ["ConflictError", "apply", "recover"]

_ODD_MODE: Final = 0o710  # as few as nothing has it unless it was given it
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FIXES: Final = {
    errno.ENOSPC: "Free space there",
    errno.EDQUOT: "Free space there",
    errno.EROFS: "Make it writable",
    errno.EACCES: "Apply them as a user who may write there",
    errno.EPERM: "Apply them as the owner of the files, and a member of their groups",
    errno.EXDEV: "Unmount what is mounted there, or name it as a root of its own",
    errno.EBUSY: "Unmount what is mounted there",
}


class _Inverse(NamedTuple):
    """What undoes the changes of one root, and the site and the name there that it is reached by."""

    root: RootChanges
    site: Site
    prefix: str


def apply(
    changes: ChangeSet,
    data_fd: int,
    folder: Path,
    *,
    on_wait: OnWait | None = None,
    keeps: bool = True,
    around: AbstractContextManager[None] | None = None,
) -> ChangeSet:
    """Bring the host from what the set says was there to what is to be, and give what undoes it.

    data_fd: the contents. folder: see above; made if missing. on_wait: called with the path of what another process
    works on, before waiting for it. keeps: whether what undoes the set is kept. around: entered while the folder is
    locked and nothing half done is in it. Where all is as it is to be nothing is done, and what undoes it is empty.

    Raises ValueError for a set that makes no sense, ConflictError (also for a part of a set of which another part is
    applied), HostError. Nothing is changed then, unless undoing was hindered: recover() goes on with that.
    """
    check_set(changes)
    with _opened(folder, on_wait), around or contextlib.nullcontext():
        _recover(folder, on_wait)
        with _told(folder):
            return _apply(changes, data_fd, folder, on_wait, keeps=keeps)


def recover(folder: Path, *, on_wait: OnWait | None = None) -> None:
    """Undo or finish what a killed apply() left. Raises HostError if something is in the way, or cannot be found."""
    if not folder.exists():
        return
    with _opened(folder, on_wait):
        _recover(folder, on_wait)


def _apply(changes: ChangeSet, data_fd: int, folder: Path, on_wait: OnWait | None, *, keeps: bool) -> ChangeSet:
    roots = [root for root in changes.roots if root.changes]
    anchors = [root_anchor(root) for root in roots]
    with _sites((path for path, _ in anchors), on_wait) as by_path:
        kept = undoes(folder)
        found = [
            compare_root(root, by_path[path].fd, prefix, kept)
            for root, (path, prefix) in zip(roots, anchors, strict=True)
        ]
        if all(one.done for one in found):
            nothing = ChangeSet(run=changes.run, roots=())
            leave(folder, nothing)
            return nothing
        wrong = list(dict.fromkeys(name for one in found for name in one.wrong))
        if kept:
            _check_part(set(kept), list(zip(roots, found, strict=True)), wrong)
        if wrong:
            raise conflict_error(wrong)
        sites = list({id(site): site for site in by_path.values()}.values())
        planner = Planner()
        inverse = []
        for root, one, (path, prefix) in zip(roots, found, anchors, strict=True):
            before = len(planner.steps)
            planner.add(next(i for i, site in enumerate(sites) if site is by_path[path]), one.items)
            back = tuple(undo_changes(one.items, planner.steps[before:]))
            undone = RootChanges(root=root.root, guest=root.guest, missing=False, changes=back)
            inverse.append(_Inverse(undone, by_path[path], prefix))
        head = Head(run=changes.run, places=tuple(site.place for site in sites))
        return _execute(folder, head, sites, planner, (inverse, data_fd), keeps=keeps)


def _check_part(kept: set[tuple[str, str]], both: list[tuple[RootChanges, Found]], wrong: list[str]) -> None:
    """Refuse the rest of a set of which a part is applied: what undoes that part, *kept*, would be lost.

    Where all that it brings back is as before, by somebody's hand, it is of no use any more. Raises ConflictError.
    """
    mine = {(root.root, item.change.name) for root, one in both for item in one.items}
    done = {(root.root, name) for root, one in both for name in one.there}
    done |= {(root.root, "") for root, _ in both if root.missing and (root.root, "") in kept}
    done_paths = {posixpath.join(*name).rstrip("/") for name in done}
    if done_paths.issuperset(wrong) if wrong else not kept <= mine:
        why = "another part of them is applied already, and x07 undo could not bring back both"
        fix = "First x07 undo, then apply all that you want at once"
        raise ConflictError("cannot apply the changes", why, fix)


def _execute(
    folder: Path, head: Head, sites: list[Site], planner: Planner, sets: tuple[list[_Inverse], int], *, keeps: bool
) -> ChangeSet:
    """Do it; what undoes it. sets: that, as it is planned, and the contents."""
    inverse, data_fd = sets
    steps, started = planner.steps, 0
    try:
        journal.announce(folder, head)
        for site in sites:
            _make_staging(site)
            # Another set may have removed the folder, as part of a root around it. Later it cannot: ours lies in it.
            _still_there(site.place.path, site, None)
        journal.announce(folder, head)
        for index, site in enumerate(sites):
            mine = (step for step in steps if step.place == index)
            fill(site, mine, planner.content, data_fd)
        journal.write(folder, head, steps)
        for number, step in enumerate(steps, start=1):
            ready(sites[step.place], step)
            started = number
            do(sites[step.place], step)
        for site in sites:
            beneath.sync(site.fd)
        roots = (
            one.root if one.site.modes else with_actual_modes(one.root, one.site.fd, one.prefix) for one in inverse
        )
        undoing = ChangeSet(run=head.run, roots=tuple(roots))
        if keeps:
            prepare(folder, undoing)
            keep(folder, sites, steps)
        journal.commit(folder)
    except BaseException:
        # An interrupt may come when the mark has just been made.
        if not journal.committed(folder):
            _roll_back(sites, steps[:started])
            _clean_up(folder, sites, steps if started else None)
        raise
    _finish(folder, sites, steps)
    return undoing


def _make_staging(site: Site) -> None:
    try:
        os.mkdir(site.place.staging, 0o700, dir_fd=site.fd)
    except FileNotFoundError as exc:  # the folder itself was removed since we opened it
        raise _elsewhere(site.place.path, None) from exc
    except OSError as exc:
        exc.filename = site.place.path  # our own name there tells nobody anything
        raise
    site.staging_fd = os.open(site.place.staging, _FOLDER, dir_fd=site.fd)
    info = os.fstat(site.staging_fd)
    site.place.staged = (info.st_dev, info.st_ino)
    with contextlib.suppress(OSError):
        os.fchmod(site.staging_fd, _ODD_MODE)
    site.modes = os.fstat(site.staging_fd).st_mode & 0o777 == _ODD_MODE
    if site.modes:
        os.fchmod(site.staging_fd, 0o700)
        site.modes = os.fstat(site.staging_fd).st_mode & 0o777 == 0o700  # noqa: PLR2004 - as it was just given


def _roll_back(sites: list[Site], started: list[Step], *, later: bool = False) -> None:
    """Undo what was started, the last first, and wait for what is in the way for a moment only.

    later: another try, where what is not in its place counts as gone, unless we hold what was there before.
    """
    for site in sites:
        if site.staging_fd < 0:  # we may have been interrupted when it had just been made
            _open_staging(site)
    until = time.monotonic() + settings.SETTLE_S
    todo = [step for step in reversed(started) if sites[step.place].staging_fd >= 0]
    while todo := [step for step in todo if not undo(sites[step.place], step)]:
        if time.monotonic() > until:
            break
        time.sleep(0.01)
    if stuck := [step for step in todo if not later or holds(sites[step.place], step)]:
        names = ", ".join(ascii(sites[step.place].path(step.name)) for step in stuck[:5])
        kept = ", ".join(ascii(sites[index].path(sites[index].place.staging)) for index in {s.place for s in stuck})
        why = f"{names} cannot be as before, since something was moved; what was there is kept in {kept}"
        raise HostError("cannot undo the changes", why, "Move it back, or away, then try again")


def _clean_up(folder: Path, sites: list[Site], steps: list[Step] | None) -> None:
    """What was new goes. steps: None before any of them was begun: all that has a name of ours is new then."""
    for index, site in enumerate(sites):
        # Before a folder of ours was recorded nothing is put in it.
        discard(site, staged(steps, index) if steps is not None else None if site.place.staged else {})
    _end(folder)


def _finish(folder: Path, sites: list[Site], steps: list[Step]) -> None:
    publish(folder)
    for index, site in enumerate(sites):
        last = [step for step in steps if step.place == index and step.kind == "mode" and step.name == "."]
        discard(site, displaced(steps, index), last[-1].new_mode if last else None)
    _end(folder)


def _end(folder: Path) -> None:
    journal.forget(folder)
    leave(folder, None)


def _recover(folder: Path, on_wait: OnWait | None) -> None:
    with _told(folder):
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
                _roll_back(sites, steps, later=True)
                _clean_up(folder, sites, steps if phase == "journal" else None)


def _open_staging(site: Site) -> None:
    """Leave staging_fd at -1 if there is none, or another than the journal says."""
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
    """Open all folders and lock them in the order of their inodes. recorded: what they must be.

    Raises ConflictError, HostError.
    """
    with contextlib.ExitStack() as stack:
        by_path: dict[str, Site] = {}
        by_ident: dict[tuple[int, int], Site] = {}
        for path in sorted(set(paths)):
            try:
                fd = beneath.open_root(path)
            except OSError as exc:
                if exc.errno not in MISSING:
                    raise
                raise _elsewhere(path, recorded) from exc
            stack.callback(close_on_fork.close, close_on_fork.keep(fd))  # a copy in a forked child would keep the lock
            info = os.fstat(fd)
            ident = (info.st_dev, info.st_ino)
            if recorded is not None and recorded[path].ident != ident:
                raise _elsewhere(path, recorded)
            if ident not in by_ident:
                place = Place(path=path, ident=ident, staging=STAGING + secrets.token_hex(8))
                by_ident[ident] = Site(place=recorded[path] if recorded else place, fd=fd)
            by_path[path] = by_ident[ident]
        for _, site in sorted(by_ident.items()):
            told = None if on_wait is None else (lambda path=site.place.path: on_wait(path))
            stack.enter_context(opened_lock(os.dup(site.fd), on_wait=told))
            stack.callback(_close_staging, site)
        for path, site in by_path.items():
            _still_there(path, site, recorded)
        yield by_path


def _close_staging(site: Site) -> None:
    if site.staging_fd >= 0:
        os.close(site.staging_fd)
        site.staging_fd = -1


def _still_there(path: str, site: Site, recorded: dict[str, Place] | None) -> None:
    """Another may have taken its place while we waited for the lock."""
    try:
        fd = beneath.open_root(path)
    except OSError as exc:
        raise _elsewhere(path, recorded) from exc
    try:
        info = os.fstat(fd)
    finally:
        os.close(fd)
    if (info.st_dev, info.st_ino) != site.place.ident:
        raise _elsewhere(path, recorded)


def _elsewhere(path: str, recorded: dict[str, Place] | None) -> Exception:
    if recorded is None:
        return conflict_error([path])
    why = f"{path!a} is not the folder in which they were begun, or is reached by a link"
    fix = f"Put that folder back; or take what you need from {recorded[path].staging} in it, and remove the journal"
    return HostError("cannot recover the changes", why, fix)


@contextlib.contextmanager
def _opened(folder: Path, on_wait: OnWait | None) -> Iterator[None]:
    """The folder of a set, for us alone. Raises HostError."""
    private_dir(folder)
    told = None if on_wait is None else (lambda: on_wait(str(folder)))
    with _told(folder), opened_lock(os.open(folder, _FOLDER), on_wait=told):
        yield


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """What the system refuses, in our words. Raises HostError."""
    try:
        yield
    except OSError as exc:
        place = exc.filename if isinstance(exc.filename, str) else os.fspath(exc.filename or folder)
        why = f"{place!a}: {exc.strerror or exc}"
        fix = _FIXES.get(exc.errno or 0, "Look at it, then try again")
        raise HostError("cannot apply the changes", why, fix) from exc
