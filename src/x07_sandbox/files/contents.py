"""Contents of files: copied with their holes, and hashed on the way."""

from __future__ import annotations

import errno
import hashlib
import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    total = hashlib.sha256()
    shift = to - at
    for begin, end, hole in _segments(source, at, at + size):
        here = begin
        while here < end:
            most = min(_PIECE, end - here)
            data = memoryview(_ZEROS)[:most] if hole else os.pread(source, most, here)
            if not data:
                raise EOFError
            total.update(data)
            if not hole:
                _write(target, data, here + shift)
            here += len(data)
    return total.hexdigest()


def _write(target: int, data: bytes | memoryview, to: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(target, view, to)
        view, to = view[done:], to + done


def _segments(fd: int, at: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """Where there are bytes and where holes, in order (lseek(2): SEEK_DATA, SEEK_HOLE)."""
    if end > os.fstat(fd).st_size:
        raise EOFError
    while at < end:
        try:
            data = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as exc:
            # ENXIO: a hole up to the end. Where a file system cannot tell, all of it is data.
            data = end if exc.errno == errno.ENXIO else at
        data = min(data, end)
        if data > at:
            yield at, data, True
        if data == end:
            return
        try:
            at = min(os.lseek(fd, data, os.SEEK_HOLE), end)
        except OSError:
            at = end
        yield data, at, False
