"""The content of a file in parts, holes as holes: read the same way on both sides."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Final

READ: Final = 128 * 1024  # small files are read at once, whatever their holes


def parts(fd: int, size: int) -> Iterator[bytes | int]:
    """Its bytes up to *size*; a number stands for so many zeros without room. Raises OSError, also if it is shorter."""
    position = 0
    while position < size:
        start, end = (0, size) if size <= READ else next_data(fd, position, size)
        if start > position:
            yield start - position
        while start < end:
            piece = os.pread(fd, min(READ, end - start), start)
            if not piece:
                raise OSError(errno.EIO, "it became shorter while it was read")
            yield piece
            start += len(piece)
        position = end


def next_data(fd: int, position: int, end: int) -> tuple[int, int]:
    """Where the next bytes that are no hole begin and end (lseek(2)); both are *end* where only a hole follows."""
    try:
        start = min(end, os.lseek(fd, position, os.SEEK_DATA))
        return start, min(end, os.lseek(fd, start, os.SEEK_HOLE)) if start < end else end
    except OSError as exc:
        # ENXIO: a hole up to the end. Where a file system cannot tell, all of it is data.
        return (end if exc.errno == errno.ENXIO else position), end
