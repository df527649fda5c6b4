"""Contents of files: copied with their holes, and hashed on the way."""

from __future__ import annotations

import hashlib
import os
from typing import Final

from x07_sandbox.channel.contents import next_data

_PIECE: Final = 1 << 20
_ZEROS: Final = bytes(_PIECE)


def digest(fd: int, size: int) -> str:
    """SHA-256, as hex digits, of the first *size* bytes, or of what there is if it is less. Raises OSError."""
    total, at = hashlib.sha256(), 0
    while at < size and (data := os.pread(fd, min(_PIECE, size - at), at)):
        total.update(data)
        at += len(data)
    return total.hexdigest()


def copy(source: int, at: int, size: int, target: int, to: int) -> str:
    """Copy *size* bytes that begin at *at* to where *to* says, and give their SHA-256.

    A hole stays one: nothing is written there, so the target must have nothing there either; the caller sets its
    length at the end. Raises OSError, EOFError if there are fewer bytes.
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
    """Write all of it there, and give where it ends. Raises OSError."""
    view = memoryview(data)
    while view:
        done = os.pwrite(target, view, to)
        view, to = view[done:], to + done
    return to


def add_zeros(digest: hashlib._Hash, count: int) -> None:
    """Update a digest by so many zeros."""
    while count > 0:
        digest.update(_ZEROS[:count])
        count -= _PIECE
