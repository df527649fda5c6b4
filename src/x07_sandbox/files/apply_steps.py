"""Applying and undoing one step (journal.Step). Inodes always show whether a step was done."""

import contextlib
import errno
from typing import Final

import msgspec

from x07_sandbox.files.inode import MISSING, Ident, OpenInode, conflict_error, ident_of, open_inode
from x07_sandbox.files.journal import Place, Step
from x07_sandbox.host import beneath

OLD: Final = ".old"  # suffix of a displaced inode's slot, on file systems where names cannot be exchanged

_CONFLICTS: Final = {*MISSING, errno.EEXIST, errno.ENOTEMPTY}


class Site(msgspec.Struct, kw_only=True):
    """A place (journal.Place) that is open and locked. staging_fd: -1 if there is no staging folder.

    keeps_modes: whether the file system stores modes. FAT, NTFS and many network file systems do not.
    """

    place: Place
    fd: int
    staging_fd: int = -1
    keeps_modes: bool = True

    def path(self, name: str) -> str:
        """Return the path of a name, for messages."""
        return self.place.path if name == "." else f"{self.place.path.rstrip('/')}/{name}"


def check_step(site: Site, step: Step) -> None:
    """Raise ConflictError if a step would change a mode that has changed since the copy.

    Called before the step counts as started. Otherwise a rollback would revert the same change made by another process.
    """
    if step.kind == "mode" and site.keeps_modes:
        with open_inode(site.fd, step.name) as found:
            if found is None or not _has_old_mode(found, step):
                raise conflict_error([site.path(step.name)])


def apply_step(site: Site, step: Step) -> None:
    """Apply a step; check that it displaced the expected inode. Raises ConflictError, OSError, even after the step."""
    if step.kind == "mode":
        if site.keeps_modes:
            _apply_mode(site, step)
        return
    try:
        with beneath.parent_of(site.fd, step.name) as (folder, name):
            if step.kind == "add":
                beneath.move(site.staging_fd, step.slot, folder, name)
                return
            slot = _displace(site, step, folder, name)
    except OSError as exc:
        if exc.errno in _CONFLICTS:
            raise conflict_error([site.path(step.name)]) from exc
        exc.filename = site.path(step.name)
        raise
    if not _is_expected(site, step, slot):
        raise conflict_error([site.path(step.name)])


def _displace(site: Site, step: Step, folder: int, name: str) -> str:
    staging = site.staging_fd
    if step.kind == "remove":
        beneath.move(folder, name, staging, step.slot)
        return step.slot
    if beneath.exchange(staging, step.slot, folder, name):
        return step.slot
    # A link and a rename would never leave the name empty, but could lose a file that another process makes meanwhile.
    beneath.move(folder, name, staging, step.slot + OLD)
    beneath.move(staging, step.slot, folder, name)
    return step.slot + OLD


def undo_step(site: Site, step: Step) -> bool:
    """Undo a step if it was done. Return False while something blocks the undo. Raises OSError."""
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
        # The parent folder was removed: with our new inode in it, or with no place left for the old inode.
        return not holds_displaced(site, step) and (
            step.new is None or ident_of(site.staging_fd, step.slot) == step.new
        )


def displaced_slot(site: Site, step: Step) -> str:
    """Return the slot that holds the inode which *step* replaced or removed. Raises OSError."""
    return step.slot if ident_of(site.staging_fd, step.slot + OLD) is None else step.slot + OLD


def _apply_mode(site: Site, step: Step) -> None:
    with open_inode(site.fd, step.name) as found:
        if found is None or not _has_old_mode(found, step):
            raise conflict_error([site.path(step.name)])
        found.set_mode(step.new_mode)
    if step.before is not None and step.before.kind == "file":
        now = msgspec.structs.replace(step.before, mode=step.new_mode)
        with open_inode(site.fd, step.name) as found:
            if found is None or found.ident != step.old or not found.matches(now):
                raise conflict_error([site.path(step.name)])


def _is_expected(site: Site, step: Step, slot: str) -> bool:
    with open_inode(site.staging_fd, slot) as old:
        if old is None or step.before is None or old.ident != step.old or old.mode != step.old_mode:
            return False
        if old.kind == "folder":
            return step.before.kind == "folder" and not old.names()
        return old.matches(msgspec.structs.replace(step.before, mode=old.mode & 0o777))


def _has_old_mode(found: OpenInode, step: Step) -> bool:
    """Return whether *found* is the step's old inode with its old mode, and has no second name if it is a file."""
    same = found.ident == step.old and found.mode == step.old_mode
    return same and not (found.kind == "file" and found.info.st_nlink > 1)


def _undo_mode(site: Site, step: Step) -> bool:
    with open_inode(site.fd, step.name) as found:
        if found is None or found.ident != step.old:
            # Our new folder was removed or never moved in, or another process made a file with the old mode.
            return step.before is None or (found is not None and found.mode == step.old_mode)
        if found.mode == step.new_mode:
            found.set_mode(step.old_mode)
    return True


def _take_back(site: Site, step: Step, folder: int, name: str) -> bool:
    staging = site.staging_fd
    old = displaced_slot(site, step)
    if step.kind == "replace" and old == step.slot and beneath.exchange(staging, old, folder, name):
        if _holds_new(site, step):
            return True
        beneath.exchange(staging, old, folder, name)
        return False
    try:
        beneath.move(folder, name, staging, step.slot)
    except FileExistsError:
        return False
    if not _holds_new(site, step):
        with contextlib.suppress(FileExistsError):
            beneath.move(staging, step.slot, folder, name)
        return False
    return _put_back(site, step, folder, name)


def _holds_new(site: Site, step: Step) -> bool:
    """Return whether the slot holds our new inode: not another process's file, and no folder that has been filled."""
    with open_inode(site.staging_fd, step.slot) as found:
        return found is not None and found.ident == step.new and not (found.kind == "folder" and found.names())


def _put_back(site: Site, step: Step, folder: int, name: str) -> bool:
    if not holds_displaced(site, step):
        # Another process may have replaced a new file. A new folder still exists, with the entries that we put into it.
        return not step.new_folder or ident_of(site.staging_fd, step.slot) == step.new
    try:
        beneath.move(site.staging_fd, displaced_slot(site, step), folder, name)
    except FileExistsError:
        return False
    return True


def holds_displaced(site: Site, step: Step) -> bool:
    """Return whether the staging folder holds an inode that the step replaced or removed. Raises OSError."""
    if step.kind == "mode":
        return False
    found = ident_of(site.staging_fd, displaced_slot(site, step))
    return found is not None and found != step.new


def staged_inodes(steps: list[Step], index: int) -> dict[str, Ident]:
    """Return, by slot, the inodes that the staging folder of place *index* holds before the first step."""
    return {step.slot: step.new for step in steps if step.place == index and step.kind != "mode" and step.new}


def displaced_inodes(steps: list[Step], index: int) -> dict[str, Ident]:
    """Return, by slot, the inodes that the staging folder of place *index* holds after all steps."""
    found: dict[str, Ident] = {}
    for step in steps:
        if step.place == index and step.kind != "mode" and step.old is not None:
            found[step.slot] = found[step.slot + OLD] = step.old
    return found
