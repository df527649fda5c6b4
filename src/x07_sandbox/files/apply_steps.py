"""One step of applying a set, done and undone. Which of both states it is in is read from inodes, never remembered."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING, Final

import msgspec

from x07_sandbox.files.inode import MISSING, Ident, OpenInode, conflict_error, ident_of, open_inode
from x07_sandbox.files.journal import Place, Step
from x07_sandbox.host import beneath

if TYPE_CHECKING:
    from collections.abc import Iterator

AWAY: Final = ".old"  # ends the name of what was taken away first, where names cannot change places
OPENED: Final = 0o600  # mode of a displaced file that its owner must not read, while we read it
_CONFLICTS: Final = {*MISSING, errno.EEXIST, errno.ENOTEMPTY}


class Site(msgspec.Struct, kw_only=True):
    """A place, opened and locked. fd: its folder. staging_fd: that of new and displaced content; -1 if it is gone.

    modes: whether its file system keeps the modes that it is given, as vfat and NTFS do not.
    """

    place: Place
    fd: int
    staging_fd: int = -1
    modes: bool = True

    def path(self, name: str) -> str:
        """For people."""
        return self.place.path if name == "." else f"{self.place.path.rstrip('/')}/{name}"


def ready(site: Site, step: Step) -> None:
    """See that a mode can be given. Raises ConflictError before the step is begun.

    To undo one that was not done would take away the same mode that somebody else has given meanwhile.
    """
    if step.kind == "mode" and site.modes:
        with open_inode(site.fd, step.name) as there:
            if there is None or not _has_old_mode(there, step):
                raise conflict_error([site.path(step.name)])


def do(site: Site, step: Step) -> None:
    """Do it, then check what it displaced, which anybody may have changed since all was checked.

    Raises ConflictError, OSError; the step may be done then.
    """
    if step.kind == "mode":
        if site.modes:
            _do_mode(site, step)
        return
    try:
        with beneath.parent_of(site.fd, step.name) as (folder, name):
            if step.kind == "add":
                beneath.move(site.staging_fd, step.slot, folder, name)
                return
            slot = _take_away(site, step, folder, name)
    except OSError as exc:
        if exc.errno in _CONFLICTS:
            raise conflict_error([site.path(step.name)]) from exc
        exc.filename = site.path(step.name)
        raise
    if slot and not _displaced(site, step, slot):
        raise conflict_error([site.path(step.name)])


def _take_away(site: Site, step: Step, folder: int, name: str) -> str:
    """Put what is there into staging, and what is new in its place; the slot to look at, if any."""
    staging = site.staging_fd
    try:
        if step.kind == "remove":
            beneath.move(folder, name, staging, step.slot)
            return step.slot
        if beneath.exchange(staging, step.slot, folder, name):
            return step.slot
    except OSError as exc:
        if exc.errno != errno.EXDEV or step.before is None or step.before.kind != "folder":
            raise
        # Where one of an overlay's lower layers has the folder it cannot be renamed, but removed.
        _remove_folder(site, step, folder, name)
        if step.kind == "replace":
            beneath.move(staging, step.slot, folder, name)
        return ""
    # Not linked away and renamed over, which would never leave the name empty: what another process has put there in
    # between would be lost.
    beneath.move(folder, name, staging, step.slot + AWAY)
    beneath.move(staging, step.slot, folder, name)
    return step.slot + AWAY


def _remove_folder(site: Site, step: Step, folder: int, name: str) -> None:
    """Remove an empty one; another like it, in staging, can come back in its place."""
    with open_inode(folder, name) as old:
        if old is None or old.ident != step.old or old.mode != step.old_mode:
            raise conflict_error([site.path(step.name)])
        other = step.slot + (AWAY if step.kind == "replace" else "")
        os.mkdir(other, 0o700, dir_fd=site.staging_fd)
        os.chown(other, old.info.st_uid, old.info.st_gid, dir_fd=site.staging_fd, follow_symlinks=False)
        # Not the mode that it was given to be opened: no step finds this one by its inode.
        os.chmod(other, (old.mode & 0o7000) | (step.before.mode & 0o777 if step.before else 0), dir_fd=site.staging_fd)
    os.rmdir(name, dir_fd=folder)


def undo(site: Site, step: Step) -> bool:
    """Undo it, done or not; False while others are in the way, or ours is not in its place. Raises OSError."""
    if step.kind == "mode":
        return _undo_mode(site, step)
    try:
        with beneath.parent_of(site.fd, step.name) as (folder, name):
            if step.new is not None and ident_of(folder, name) == step.new:
                return _take_back(site, step, folder, name)
            return _put_back(site, step, folder, name)
    except OSError as exc:
        if exc.errno not in MISSING:
            raise
        # Its folder is gone or elsewhere, and with it what is ours, or there is no place for what is theirs.
        return not holds(site, step) and (step.new is None or ident_of(site.staging_fd, step.slot) == step.new)


def displaced_slot(site: Site, step: Step) -> str:
    """The name under which the displaced thing of a done step lies in staging. Raises OSError."""
    return step.slot if ident_of(site.staging_fd, step.slot + AWAY) is None else step.slot + AWAY


def _do_mode(site: Site, step: Step) -> None:
    with open_inode(site.fd, step.name) as there:
        if there is None or not _has_old_mode(there, step):
            raise conflict_error([site.path(step.name)])
        there.set_mode(step.new_mode)
    if step.before is not None and step.before.kind == "file":
        now = msgspec.structs.replace(step.before, mode=step.new_mode)
        with open_inode(site.fd, step.name) as there:
            if there is None or there.ident != step.old or not there.matches(now, blind=True):
                raise conflict_error([site.path(step.name)])


def _displaced(site: Site, step: Step, slot: str) -> bool:
    """Whether what lies in a slot now is what was there when all was checked."""
    with open_inode(site.staging_fd, slot) as old:
        if old is None or step.before is None or old.ident != step.old or old.mode != step.old_mode:
            return False
        if old.kind == "folder":
            return step.before.kind == "folder" and not old.names()
        before = msgspec.structs.replace(step.before, mode=old.mode & 0o777)
        try:
            return old.matches(before)
        except PermissionError:
            with _readable(old):
                return old.matches(before)


@contextlib.contextmanager
def _readable(old: OpenInode) -> Iterator[None]:
    """A file of ours that even we must not read. Undoing the step gives it its mode again if we are killed here."""
    old.set_mode(OPENED)
    try:
        yield
    finally:
        old.set_mode(old.mode)


def _has_old_mode(there: OpenInode, step: Step) -> bool:
    """Whether it is as when it was looked at, and has no other name since."""
    same = there.ident == step.old and there.mode == step.old_mode
    return same and not (there.kind == "file" and there.info.st_nlink > 1)


def _undo_mode(site: Site, step: Step) -> bool:
    with open_inode(site.fd, step.name) as there:
        if there is None or there.ident != step.old:
            # Ours, and back already, or never there; or one that stands in for it.
            return step.before is None or (there is not None and there.mode == step.old_mode)
        if there.mode == step.new_mode:
            there.set_mode(step.old_mode)
    return True


def _take_back(site: Site, step: Step, folder: int, name: str) -> bool:
    """What is under the name is ours: it goes, and what it displaced comes back."""
    staging = site.staging_fd
    old = displaced_slot(site, step)
    if step.kind == "replace" and old == step.slot:
        _give_mode(site, step, old)
        if beneath.exchange(staging, old, folder, name):
            if _is_ours(site, step):
                return True
            beneath.exchange(staging, old, folder, name)
            return False
    try:
        beneath.move(folder, name, staging, step.slot)
    except FileExistsError:
        return False
    if not _is_ours(site, step):
        with contextlib.suppress(FileExistsError):
            beneath.move(staging, step.slot, folder, name)
        return False
    return _put_back(site, step, folder, name)


def _is_ours(site: Site, step: Step) -> bool:
    """Not what somebody has put there just now, nor a folder in which somebody has put something."""
    with open_inode(site.staging_fd, step.slot) as there:
        return there is not None and there.ident == step.new and not (there.kind == "folder" and there.names())


def _put_back(site: Site, step: Step, folder: int, name: str) -> bool:
    """Nothing of ours is under the name: what we took from there comes back."""
    if not holds(site, step):
        # A file of ours may have been replaced. A folder of ours is somewhere, with what we have put in it.
        return not step.new_folder or ident_of(site.staging_fd, step.slot) == step.new
    old = displaced_slot(site, step)
    _give_mode(site, step, old)
    try:
        beneath.move(site.staging_fd, old, folder, name)
    except FileExistsError:
        return ident_of(folder, name) == step.old and _never_went(site, old, folder, name)
    return True


def _never_went(site: Site, slot: str, folder: int, name: str) -> bool:
    """Whether what is in a slot only was made to stand in for the folder that is under its name."""
    with open_inode(site.staging_fd, slot) as there:
        if there is None or (there.kind == "folder" and not there.names()):
            return True
    # We were killed when it had changed places with what somebody had put there just then: that has to go back.
    beneath.exchange(site.staging_fd, slot, folder, name)
    return False


def holds(site: Site, step: Step) -> bool:
    """Whether something that we took away lies in staging. Raises OSError."""
    if step.kind == "mode":
        return False
    found = ident_of(site.staging_fd, displaced_slot(site, step))
    return found is not None and found != step.new


def _give_mode(site: Site, step: Step, slot: str) -> None:
    """What was displaced is as it was, should we have been killed while we read it; a mode of others' stays."""
    with open_inode(site.staging_fd, slot) as old:
        opened = old is not None and old.mode == OPENED and not step.old_mode & 0o400
        if opened and old is not None and old.kind == "file" and old.ident == step.old:
            old.set_mode(step.old_mode)


def staged(steps: list[Step], index: int) -> dict[str, Ident]:
    """What is new, and lies in the staging folder of a place when no step is done."""
    return {step.slot: step.new for step in steps if step.place == index and step.kind != "mode" and step.new}


def displaced(steps: list[Step], index: int) -> dict[str, Ident]:
    """What lies in the staging folder of a place when all steps are done."""
    found: dict[str, Ident] = {}
    for step in steps:
        if step.place == index and step.kind != "mode" and step.old is not None:
            found[step.slot] = found[step.slot + AWAY] = step.old
    return found
