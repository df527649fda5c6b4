"""Open inodes of the host, their contents, their comparison with nodes of a change set, and the conflict error."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from x07_sandbox.channel.contents import next_data
from x07_sandbox.errors import Command, SandboxError
from x07_sandbox.files.changes import Node
from x07_sandbox.host import beneath
from x07_sandbox.host.paths import closing_fd

Ident = tuple[int, int]
"""Device and inode number."""

NAMES_MAX: Final = 100
_SHOWN: Final = 5
# Errors for a path of which a part is missing, not a folder, or a link.
MISSING: Final = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
_KINDS: Final = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link"}

_PIECE: Final = 1 << 20
_ZEROS: Final = bytes(_PIECE)


class ConflictError(SandboxError):
    """Files on the host changed since the copy, so nothing was applied. names: at most NAMES_MAX of *count* paths."""

    names: tuple[str, ...] = ()
    count: int = 0


def conflict_error(names: Sequence[str], count: int = 0, review: str = "x07 diff") -> ConflictError:
    """Return the error that lists these absolute paths. count: of all paths. review: the command that shows changes."""
    count = count or len(names)
    why = f"{_some(names, count)} changed on the host after the run had copied the folder"
    fix = ("Run the program again, or review the changes: ", Command(review))
    error = ConflictError("cannot apply the changes", why, fix)
    error.names, error.count = tuple(names[:NAMES_MAX]), count
    return error


def undo_conflict_error(error: ConflictError, what: str, review: str) -> ConflictError:
    """Return *error*, reworded for an undo. what: the first part of the new message. review: see `conflict_error`."""
    why = f"{_some(error.names, error.count)} changed on the host after the changes had been applied"
    undo_error = ConflictError(what, why, ("Restore files by hand. To see the earlier content: ", Command(review)))
    undo_error.names, undo_error.count = error.names, error.count
    return undo_error


def _some(names: Sequence[str], count: int) -> str:
    more = f" and {count - _SHOWN} more" if count > _SHOWN else ""
    return f"{', '.join(ascii(name) for name in names[:_SHOWN])}{more}"


class OpenInode:
    """An inode, open as an O_PATH descriptor. info: its status when it was opened."""

    __slots__ = ("_digest", "fd", "info")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.info = os.fstat(fd)
        self._digest = ""

    @property
    def ident(self) -> Ident:
        """Device and inode number."""
        return self.info.st_dev, self.info.st_ino

    @property
    def mode(self) -> int:
        """All twelve mode bits."""
        return stat.S_IMODE(self.info.st_mode)

    @property
    def kind(self) -> str | None:
        """The kind, as in `Node.kind`; None for a kind that no change set can hold."""
        return _KINDS.get(stat.S_IFMT(self.info.st_mode))

    @property
    def proc_path(self) -> str:
        """A path that reaches this inode even after its names change."""
        return f"/proc/self/fd/{self.fd}"

    def matches(self, node: Node) -> bool:
        """Return whether the inode is equal to *node*. Raises OSError."""
        if self.kind != node.kind:
            return False
        if node.kind == "link":
            return os.readlink("", dir_fd=self.fd) == node.target
        if (self.mode ^ node.mode) & 0o777:
            return False
        if node.kind == "folder":
            return True
        return self.info.st_size == node.size and self._sha256(node.size) == node.sha256

    def names(self) -> list[str]:
        """Return the names in this folder. Raises OSError."""
        return os.listdir(self.proc_path)  # noqa: PTH208 - it has no path of its own

    def set_mode(self, mode: int) -> None:
        """Set the mode of this file or folder. Raises OSError."""
        Path(self.proc_path).chmod(mode)

    def open_file(self) -> int:
        """Open this file for reading and return the new descriptor. Raises OSError."""
        return os.open(self.proc_path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def _sha256(self, size: int) -> str:
        if not self._digest:
            with closing_fd(self.open_file()) as fd:
                self._digest = digest(fd, size)
        return self._digest


@contextlib.contextmanager
def open_inode(dir_fd: int, name: str) -> Iterator[OpenInode | None]:
    """Open a name below a folder; yield None if it does not exist. Raises OSError."""
    try:
        fd = beneath.look(dir_fd, name)
    except OSError as exc:
        if exc.errno not in MISSING:
            raise
        fd = -1
    try:
        yield OpenInode(fd) if fd >= 0 else None
    finally:
        if fd >= 0:
            os.close(fd)


def ident_of(dir_fd: int, name: str) -> Ident | None:
    """Return the device and inode number of a name in a folder, or None if the name does not exist. Raises OSError."""
    try:
        info = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return info.st_dev, info.st_ino


def digest(fd: int, size: int) -> str:
    """Return the SHA-256 in hex of the first *size* bytes, or of the whole file if it is shorter. Raises OSError."""
    total, at = hashlib.sha256(), 0
    while at < size and (data := os.pread(fd, min(_PIECE, size - at), at)):
        total.update(data)
        at += len(data)
    return total.hexdigest()


def copy(source: int, at: int, size: int, target: int, to: int) -> str:
    """Copy *size* bytes from offset *at* of *source* to offset *to* of *target*, skipping holes; return their SHA-256.

    The caller must set the length of *target*. Raises OSError, and EOFError if the source is too short.
    """
    if at + size > os.fstat(source).st_size:
        raise EOFError
    total, end = hashlib.sha256(), at + size
    shift = to - at
    while at < end:
        begin, stop = next_data(source, at, end)
        add_zeros(total, begin - at)
        at = begin
        while at < stop:
            data = os.pread(source, min(_PIECE, stop - at), at)
            if not data:
                raise EOFError
            total.update(data)
            write(target, data, at + shift)
            at += len(data)
    return total.hexdigest()


def write(target: int, data: bytes, to: int) -> int:
    """Write all of *data* at offset *to* and return the end offset. Raises OSError."""
    view = memoryview(data)
    while view:
        done = os.pwrite(target, view, to)
        view, to = view[done:], to + done
    return to


def add_zeros(digest: hashlib._Hash, count: int) -> None:
    """Update a digest with *count* zero bytes."""
    while count > 0:
        digest.update(_ZEROS[:count])
        count -= _PIECE
