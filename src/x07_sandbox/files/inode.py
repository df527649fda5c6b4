"""What lies on the host under a name, held open while it is looked at and compared with what should be there."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

from x07_sandbox.errors import SandboxError
from x07_sandbox.files import contents
from x07_sandbox.host import beneath

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from x07_sandbox.files.changes import Node

Ident = tuple[int, int]
"""Device and inode."""

NAMES_MAX: Final = 100
_SHOWN: Final = 5
# Something on the way is missing, is no folder, or is a link.
MISSING: Final = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
_KINDS: Final = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link"}


class ConflictError(SandboxError):
    """The host is not as it was when it was copied, and nothing of the set was applied.

    names: absolute paths that are not as the set says they were, at most NAMES_MAX. count: of all.
    """

    names: tuple[str, ...] = ()
    count: int = 0


def conflict_error(names: Sequence[str]) -> ConflictError:
    """The error about these paths."""
    why = f"the host has changed since it was copied: {_some(names, len(names))}"
    error = ConflictError("cannot apply the changes", why, "Look at the changes, and run the program again")
    error.names, error.count = tuple(names[:NAMES_MAX]), len(names)
    return error


def undo_conflict_error(error: ConflictError, what: str) -> ConflictError:
    """The same error about changes that were to be taken back. what: what cannot be done."""
    why = f"the host has changed since they were applied: {_some(error.names, error.count)}"
    other = ConflictError(what, why, "Change by hand what you want back: x07 diff shows what was there")
    other.names, other.count = error.names, error.count
    return other


def _some(names: Sequence[str], count: int) -> str:
    more = f" and {count - _SHOWN} more" if count > _SHOWN else ""
    return f"{', '.join(ascii(name) for name in names[:_SHOWN])}{more}"


class OpenInode:
    """What an O_PATH descriptor leads to. info: as it was when it was opened."""

    __slots__ = ("_digest", "fd", "info")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.info = os.fstat(fd)
        self._digest = ""

    @property
    def ident(self) -> Ident:
        """Device and inode."""
        return self.info.st_dev, self.info.st_ino

    @property
    def mode(self) -> int:
        """All twelve bits."""
        return stat.S_IMODE(self.info.st_mode)

    @property
    def kind(self) -> str | None:
        """As a Node has it; None for what no set can hold."""
        return _KINDS.get(stat.S_IFMT(self.info.st_mode))

    @property
    def place(self) -> str:
        """A name that leads to this very inode, whatever happens to its other names."""
        return f"/proc/self/fd/{self.fd}"

    def matches(self, node: Node, *, blind: bool = False) -> bool:
        """Whether it is what *node* says. blind: a file that we must not read counts by size and mode.

        Raises OSError.
        """
        if self.kind != node.kind:
            return False
        if node.kind == "link":
            return os.readlink("", dir_fd=self.fd) == node.target
        if (self.mode ^ node.mode) & 0o777:
            return False
        if node.kind == "folder":
            return True
        try:
            return self.info.st_size == node.size and self._sha256(node.size) == node.sha256
        except PermissionError:
            if blind:
                return True
            raise

    def names(self) -> list[str]:
        """What is in a folder. Raises OSError."""
        return os.listdir(self.place)  # noqa: PTH208 - it has no path of its own

    def set_mode(self, mode: int) -> None:
        """Of a file or folder. Raises OSError."""
        Path(self.place).chmod(mode)

    def _sha256(self, size: int) -> str:
        if not self._digest:
            fd = os.open(self.place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                self._digest = contents.digest(fd, size)
            finally:
                os.close(fd)
        return self._digest


@contextlib.contextmanager
def open_inode(dir_fd: int, name: str) -> Iterator[OpenInode | None]:
    """What is under a name below an opened folder; None if there is nothing. Raises OSError."""
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


def listed(fd: int) -> list[str]:
    """Names in an opened folder. Raises OSError."""
    return os.listdir(fd)


def ident_of(dir_fd: int, name: str) -> Ident | None:
    """Device and inode of a name in an opened folder; None if there is nothing. Raises OSError."""
    try:
        info = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return info.st_dev, info.st_ino
