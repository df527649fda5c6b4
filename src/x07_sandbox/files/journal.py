"""The journal of the steps that apply a change set, so that x07 can roll back or finish them after a kill.

The journal is one of three files in the set's private folder. `staging` is written while staging folders are filled,
before anything else changes. `journal` is written once all steps are known; recovery then rolls back. `committed` is
written once all steps are done; recovery then publishes the undo set and removes the staged old content. The first line
of each file is a `Head`, every other line a `Step`.

Inodes always show whether a step was done (`apply_step`, `undo_step`).
"""

import contextlib
import errno
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Literal, TypeVar

import msgspec

from x07_sandbox.errors import HostError
from x07_sandbox.files.changes import Node
from x07_sandbox.files.inode import MISSING, Ident, OpenInode, conflict_error, ident_of, open_inode
from x07_sandbox.host import beneath
from x07_sandbox.host.documents import prepared
from x07_sandbox.host.paths import closing_fd, replace_file

Phase = Literal["staging", "journal", "committed"]
StepKind = Literal["mode", "remove", "replace", "add"]
_PHASES: Final[tuple[Phase, ...]] = ("committed", "journal", "staging")  # the later one counts
_VERSION: Final = 1

OLD: Final = ".old"  # suffix of a displaced inode's slot, on file systems where names cannot be exchanged

_CONFLICTS: Final = {*MISSING, errno.EEXIST, errno.ENOTEMPTY}


class Place(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A folder of the host in which steps are carried out. staging, staged: name and inode of its staging folder."""

    path: str
    ident: Ident
    staging: str
    staged: Ident | None = None


class Head(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The first line of a journal: the run, and the folders in which its steps are carried out."""

    version: Literal[1] = _VERSION
    run: str
    places: tuple[Place, ...]


class Step(msgspec.Struct, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """One operation on one name.

    kind: the operation. `mode`: the inode *old* gets new_mode. `remove`: the old inode moves to the slot.
    `replace`: the old inode and the inode in the slot change places. `add`: the inode in the slot moves to the name.
    place: index into Head.places.
    name: relative to the place; "." is the place itself.
    slot: a name in the staging folder of the place.
    new: the staged inode.
    new_folder: whether the staged inode is a folder.
    old, old_mode, before: the inode, mode and node that the name had before the step.
    undo_at: offset of the old content in the data of the undo set; -1 if it is not saved.
    """

    kind: StepKind
    place: int
    name: str
    slot: str = ""
    new: Ident | None = None
    new_folder: bool = False
    old: Ident | None = None
    old_mode: int = 0
    new_mode: int = 0
    before: Node | None = None
    undo_at: int = -1


_Line = TypeVar("_Line", Head, Step)


def write(folder: Path, phase: Phase, head: Head, steps: Iterable[Step] = ()) -> None:
    """Write the file of a phase. Raises OSError.

    `staging` records the names of the staging folders and, once these exist, their inodes. `journal` records the steps,
    before the first one is carried out. The text is ASCII, because names may be invalid UTF-8.
    """
    values = (msgspec.to_builtins(value) for value in (head, *steps))
    lines = (json.dumps(value, separators=(",", ":")).encode("ascii") + b"\n" for value in values)
    replace_file(folder / phase, b"".join(lines), sync=True)
    _sync_folder(folder)


def commit(folder: Path) -> None:
    """Mark all steps as done. If this function raises OSError, nothing is committed."""
    (folder / "journal").rename(folder / "committed")
    # If a power cut loses the rename, recovery rolls everything back. That is no reason to roll back now.
    with contextlib.suppress(OSError):
        _sync_folder(folder)


def committed(folder: Path) -> bool:
    """Return whether the steps are committed."""
    return (folder / "committed").exists()


def pending(folder: Path) -> bool:
    """Return whether the folder has a journal, which means that its steps must be rolled back or finished."""
    return any((folder / phase).exists() for phase in _PHASES)


def remove(folder: Path) -> None:
    """Remove the journal. Raises OSError."""
    for phase in reversed(_PHASES):
        for path in (folder / phase, *folder.glob(f".{phase}.*")):  # and what a killed replace_file() left
            path.unlink(missing_ok=True)


def read(folder: Path) -> tuple[Phase, Head, list[Step]] | None:
    """Return the last phase and its file's content, or None if there is no journal. Raises OSError, HostError."""
    for phase in _PHASES:
        with contextlib.suppress(FileNotFoundError), (folder / phase).open("rb") as file:
            try:
                return phase, _decode(next(file), Head), [_decode(line, Step) for line in file]
            except (ValueError, StopIteration) as exc:
                fix = "Check the folders .x07-apply-* at the paths in the journal, then remove the journal"
                raise HostError(f"cannot read the journal {folder / phase}", str(exc), fix) from exc
    return None


def _decode(line: bytes, model: type[_Line]) -> _Line:
    return msgspec.convert(json.loads(line), prepared(model))


def _sync_folder(folder: Path) -> None:
    with closing_fd(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
        os.fsync(fd)


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
