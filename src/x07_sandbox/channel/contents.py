"""Reading a sparse file in parts, on both sides of the channel."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Final

READ: Final = 128 * 1024  # files up to this size are read whole, holes included


def parts(fd: int, size: int) -> Iterator[bytes | int]:
    """Yield a file's content up to *size*: data as bytes, holes as their length. Raises OSError if the file shrinks."""
    position = 0
    while position < size:
        start, end = (0, size) if size <= READ else next_data(fd, position, size)
        if start > position:
            yield start - position
        while start < end:
            piece = os.pread(fd, min(READ, end - start), start)
            if not piece:
                raise OSError(errno.EIO, "the file shrank while it was read")
            yield piece
            start += len(piece)
        position = end


def next_data(fd: int, position: int, end: int) -> tuple[int, int]:
    """Return start and end of the next data segment (lseek(2)). Both numbers are *end* if only a hole follows."""
    try:
        start = min(end, os.lseek(fd, position, os.SEEK_DATA))
        return start, min(end, os.lseek(fd, start, os.SEEK_HOLE)) if start < end else end
    except OSError as exc:
        # ENXIO: a hole up to the end. Any other error: the file system cannot tell, so treat all as data.
        return (end if exc.errno == errno.ENXIO else position), end
