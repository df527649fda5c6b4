"""The undo set of the changes that were applied last: replaced and removed content, copied from staging folders.

*folder* is always the private folder of the change set. publish() replaces the current undo set by the prepared one.
An undo is a change set too: its folder is named UNDOING and lies in the one whose undo set it uses. It has no undo set
of its own, and publish() takes the used one away.
"""

import contextlib
import os
import re
import stat
from pathlib import Path
from typing import Final

from x07_sandbox.errors import HostError
from x07_sandbox.files import changes as data_model
from x07_sandbox.files import contents
from x07_sandbox.files.apply_steps import OLD, Site, displaced_slot
from x07_sandbox.files.changes import Change, ChangeSet, Node
from x07_sandbox.files.inode import Ident, open_inode
from x07_sandbox.files.journal import Step
from x07_sandbox.host.paths import closing_fd, replace_file

_SLOT: Final = re.compile(rf"\d+({re.escape(OLD)})?", re.ASCII)
_NEXT, _PLANNED, _CHANGES, _DATA = "undo.new", "planned.json", "changes.json", "data"
_OPEN: Final = 0o300
UNDOING: Final = "undoing"


def undo_entries(folder: Path) -> dict[tuple[str, str], Change]:
    """Return the changes that an undo would make, by root and name. Raises OSError, and ValueError for damaged data."""
    try:
        undo_set = data_model.decode((folder / "undo" / _CHANGES).read_bytes())
    except FileNotFoundError:
        return {}
    return {(root.root, change.name): change for root in undo_set.roots for change in root.changes}


def prepare(folder: Path, undo_set: ChangeSet) -> None:
    """Write *undo_set* to *folder*, to be published later. Raises OSError."""
    _remove(folder / _NEXT)
    (folder / _NEXT).mkdir(0o700)
    replace_file(folder / _NEXT / _PLANNED, data_model.encode(undo_set), sync=True)


def drop_prepared(folder: Path) -> None:
    """Remove a prepared undo set that was not published. Raises OSError."""
    _remove(folder / _NEXT)


def publish_empty(folder: Path, undo_set: ChangeSet) -> None:
    """Publish an undo set without content, unless an undo set exists already. Raises OSError."""
    if folder.name == UNDOING:
        publish(folder)
    elif not (folder / "undo").exists():
        prepare(folder, undo_set)
        (folder / _NEXT / _DATA).touch(0o600)
        (folder / _NEXT / _PLANNED).rename(folder / _NEXT / _CHANGES)
        publish(folder)


def save_displaced(folder: Path, sites: list[Site], steps: list[Step]) -> None:
    """Copy the content of every replaced or removed file into the prepared undo set. Raises OSError, HostError."""
    prepared = folder / _NEXT
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with closing_fd(os.open(prepared / _DATA, flags, 0o600)) as fd:
        end = 0
        for step in steps:
            if step.undo_at >= 0 and step.before is not None:
                _copy_displaced(fd, sites[step.place], step, step.before)
                end = max(end, step.undo_at + step.before.size)
        os.ftruncate(fd, end)  # the last file may end in a hole
        os.fsync(fd)
    (prepared / _PLANNED).rename(prepared / _CHANGES)


def publish(folder: Path) -> None:
    """Make the prepared undo set the current one, or end an undo. May be repeated after a kill. Raises OSError."""
    if folder.name == UNDOING:
        if not (folder / _NEXT).exists():  # else it was moved before the kill
            (folder.parent / "undo").rename(folder / _NEXT)
    elif (folder / _NEXT).exists():
        _remove(folder / "undo")
        (folder / _NEXT).rename(folder / "undo")


def remove_staging(site: Site, known: dict[str, Ident] | None, mode: int | None = None) -> None:
    """Remove a staging folder and its inodes. known: the inodes to remove, by slot; None to go by the names of slots.

    mode: the final mode of the parent folder, if x07 has set one. Raises OSError, and HostError if anything is left.
    """
    if site.staging_fd >= 0:
        names = os.listdir(site.staging_fd)  # noqa: PTH208 - it is a descriptor
        left = [name for name in names if not _remove_slot(site.staging_fd, name, known)]
        if left:
            shown = ", ".join(map(ascii, sorted(left)[:5]))
            why = f"{site.path(site.place.staging)!a} holds {shown}, which x07 did not create"
            raise HostError("cannot clean up after the changes", why, "Move these files away, then try again")
        if mode is not None and stat.S_IMODE(os.fstat(site.fd).st_mode) == mode:
            os.fchmod(site.fd, mode | _OPEN)  # else we could not remove anything from it
        os.rmdir(site.place.staging, dir_fd=site.fd)
    if mode is not None and stat.S_IMODE(os.fstat(site.fd).st_mode) == mode | _OPEN:
        os.fchmod(site.fd, mode)


def _copy_displaced(fd: int, site: Site, step: Step, before: Node) -> None:
    why = f"{site.path(step.name)!a} changed or was removed while the changes were applied"
    lost = HostError("cannot apply the changes", why, "Try again")
    if site.staging_fd < 0:
        raise lost
    with open_inode(site.staging_fd, displaced_slot(site, step)) as old:
        if old is None or old.ident != step.old or old.info.st_size != before.size:
            raise lost
        try:
            with closing_fd(old.open_file()) as source:
                copied = contents.copy(source, 0, before.size, fd, step.undo_at)
        except EOFError:
            raise lost from None
        if copied != before.sha256:
            raise lost


def _remove_slot(staging_fd: int, name: str, known: dict[str, Ident] | None) -> bool:
    with open_inode(staging_fd, name) as found:
        if found is None:
            return True
        if found.kind == "folder" and _SLOT.fullmatch(name):
            if found.names():
                return False
            os.rmdir(name, dir_fd=staging_fd)
            return True
        if not (_SLOT.fullmatch(name) if known is None else known.get(name) == found.ident):
            return False
        os.unlink(name, dir_fd=staging_fd)
        return True


def _remove(folder: Path) -> None:
    """Remove an undo set, which may be incomplete. `changes.json` goes first, so that a partial set is never used."""
    with contextlib.suppress(FileNotFoundError):
        for path in sorted(folder.iterdir(), key=lambda path: path.name != _CHANGES):
            path.unlink()  # including what a killed replace_file() left behind
        folder.rmdir()
