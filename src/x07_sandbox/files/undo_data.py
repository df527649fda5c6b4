"""What a set displaced: kept as the set that undoes it, then removed from where it was moved to."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from typing import TYPE_CHECKING, Final

from x07_sandbox.errors import HostError
from x07_sandbox.files import changes as data_model
from x07_sandbox.files import contents
from x07_sandbox.files.apply_steps import AWAY, OPENED, displaced_slot
from x07_sandbox.files.inode import listed, open_inode
from x07_sandbox.host.paths import replace_file

if TYPE_CHECKING:
    from pathlib import Path

    from x07_sandbox.files.apply_steps import Site
    from x07_sandbox.files.changes import Change, ChangeSet, Node
    from x07_sandbox.files.inode import Ident
    from x07_sandbox.files.journal import Step

_SLOT: Final = re.compile(rf"\d+({re.escape(AWAY)})?", re.ASCII)
_NEXT, _PLANNED, _CHANGES, _DATA = "undo.new", "planned.json", "changes.json", "data"
_OPEN: Final = 0o300


def undoes(folder: Path) -> dict[tuple[str, str], Change]:
    """What is kept would bring back, by root and name. Raises ValueError if it is damaged, OSError."""
    try:
        kept = data_model.decode((folder / "undo" / _CHANGES).read_bytes())
    except FileNotFoundError:
        return {}
    return {(root.root, change.name): change for root in kept.roots for change in root.changes}


def prepare(folder: Path, undoing: ChangeSet) -> None:
    """Write what will undo the set, before anything is done. Raises OSError."""
    _remove(folder / _NEXT)
    (folder / _NEXT).mkdir(0o700)
    replace_file(folder / _NEXT / _PLANNED, data_model.encode(undoing), sync=True)


def leave(folder: Path, undoing: ChangeSet | None) -> None:
    """Remove what only prepare() made; and keep *undoing*, if nothing was kept before. Raises OSError."""
    _remove(folder / _NEXT)
    if undoing is not None and not (folder / "undo").exists():
        prepare(folder, undoing)
        (folder / _NEXT / _DATA).touch(0o600)
        (folder / _NEXT / _PLANNED).rename(folder / _NEXT / _CHANGES)
        publish(folder)


def keep(folder: Path, sites: list[Site], steps: list[Step]) -> None:
    """Copy all displaced contents, of which there is no other copy then. Raises OSError, HostError."""
    there = folder / _NEXT
    fd = os.open(there / _DATA, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        end = 0
        for step in steps:
            if step.undo_at >= 0 and step.before is not None:
                _copy_one(fd, sites[step.place], step, step.before)
                end = max(end, step.undo_at + step.before.size)
        os.ftruncate(fd, end)  # with a hole there, if the last one ends in a hole
        os.fsync(fd)
    finally:
        os.close(fd)
    (there / _PLANNED).rename(there / _CHANGES)


def publish(folder: Path) -> None:
    """Have it be what undoes the last set. Raises OSError."""
    if (folder / _NEXT).exists():
        _remove(folder / "undo")
        (folder / _NEXT).rename(folder / "undo")


def drop(folder: Path) -> None:
    """Keep nothing any more: as a whole, should we be killed. Raises OSError."""
    _remove(folder / _NEXT)
    (folder / "undo").rename(folder / _NEXT)
    _remove(folder / _NEXT)


def discard(site: Site, known: dict[str, Ident] | None, mode: int | None = None) -> None:
    """Remove a staging folder, and in it what is *known*, or, if that is None, what has a name of ours.

    mode: which its place has to have in the end, if we have set one. Raises HostError if it holds more, OSError.
    """
    if site.staging_fd >= 0:
        left = [name for name in listed(site.staging_fd) if not _remove_slot(site.staging_fd, name, known)]
        if left:
            names = ", ".join(map(ascii, sorted(left)[:5]))
            why = f"{site.path(site.place.staging)!a} holds {names}, which is not ours"
            raise HostError("cannot clean up after the changes", why, "Move that away, then try again")
        if mode is not None and stat.S_IMODE(os.fstat(site.fd).st_mode) == mode:
            os.fchmod(site.fd, mode | _OPEN)  # else we could not remove anything from it
        os.rmdir(site.place.staging, dir_fd=site.fd)
    if mode is not None and stat.S_IMODE(os.fstat(site.fd).st_mode) == mode | _OPEN:
        os.fchmod(site.fd, mode)


def _copy_one(fd: int, site: Site, step: Step, before: Node) -> None:
    why = f"{site.path(step.name)!a} changed or went while they were applied"
    lost = HostError("cannot apply the changes", why, "Try again")
    if site.staging_fd < 0:
        raise lost
    with open_inode(site.staging_fd, displaced_slot(site, step)) as old:
        if old is None or old.ident != step.old or old.info.st_size != before.size:
            raise lost
        closed = not step.old_mode & 0o400
        if closed:
            old.set_mode(OPENED)
        try:
            source = os.open(old.place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        finally:
            if closed:  # it is to be removed, but may have other names
                old.set_mode(step.old_mode)
        try:
            if contents.copy(source, 0, before.size, fd, step.undo_at) != before.sha256:
                raise lost
        except EOFError:
            raise lost from None
        finally:
            os.close(source)


def _remove_slot(staging_fd: int, name: str, known: dict[str, Ident] | None) -> bool:
    with open_inode(staging_fd, name) as there:
        if there is None:
            return True
        if there.kind == "folder" and _SLOT.fullmatch(name):  # also one that stood in for another
            if there.names():
                return False
            os.rmdir(name, dir_fd=staging_fd)
            return True
        if not (_SLOT.fullmatch(name) if known is None else known.get(name) == there.ident):
            return False
        os.unlink(name, dir_fd=staging_fd)
        return True


def _remove(folder: Path) -> None:
    """One of ours, of which a part may be gone. The name that makes it count goes first, so that no half counts."""
    with contextlib.suppress(FileNotFoundError):
        for path in sorted(folder.iterdir(), key=lambda path: path.name != _CHANGES):
            path.unlink()  # what a killed replace_file() left is among them
        folder.rmdir()
