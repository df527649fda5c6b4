"""The content of a file in parts, holes as holes: read the same way on both sides."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

READ: Final = 128 * 1024  # small files are read at once, whatever their holes


def parts(fd: int, size: int) -> Iterator[bytes | int]:
    """Its bytes up to *size*, in order; a whole number stands for so many zeros that take no room.

    Raises OSError, also where the file ends before that.
    """
    position = 0
    while position < size:
        start, end = (0, size) if size <= READ else _data(fd, position, size)
        if start > position:
            yield start - position
        while start < end:
            piece = os.pread(fd, min(READ, end - start), start)
            if not piece:
                raise OSError(errno.EIO, "it became shorter while it was read")
            yield piece
            start += len(piece)
        position = end


def _data(fd: int, position: int, size: int) -> tuple[int, int]:
    """Where the next bytes that are no hole begin and end; both are *size* where only a hole follows."""
    try:
        start = min(size, os.lseek(fd, position, os.SEEK_DATA))
    except OSError as exc:
        if exc.errno != errno.ENXIO:  # a file system without holes, or without this
            return position, size
        return size, size
    return start, min(size, os.lseek(fd, start, os.SEEK_HOLE)) if start < size else size
