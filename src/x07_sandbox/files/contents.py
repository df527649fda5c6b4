"""Copying and hashing of file contents; holes stay holes."""

from __future__ import annotations

import hashlib
import os
from typing import Final

from x07_sandbox.channel.contents import next_data

_PIECE: Final = 1 << 20
_ZEROS: Final = bytes(_PIECE)


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
