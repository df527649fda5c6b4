"""Reproducible newc cpio archives, the format of an initramfs."""

import stat
from collections.abc import Sequence
from dataclasses import dataclass

MAX_FILE_BYTES = 0xFFFFFFFF  # the size field has eight hexadecimal digits
_TRAILER = "TRAILER!!!"


@dataclass(frozen=True, slots=True)
class Entry:
    """One file or folder; mode includes the type (stat.S_IFREG or stat.S_IFDIR)."""

    name: str
    mode: int
    data: bytes = b""


def folder(name: str, mode: int = 0o755) -> Entry:
    """Return an entry for a folder."""
    return Entry(name, stat.S_IFDIR | mode)


def file(name: str, data: bytes, mode: int = 0o444) -> Entry:
    """Return an entry for a regular file."""
    return Entry(name, stat.S_IFREG | mode, data)


def pack(entries: Sequence[Entry]) -> bytes:
    """Return the archive, with owner root, inode numbers from 1 and no times.

    Raises ValueError for an empty, absolute or duplicate name, and for a file over MAX_FILE_BYTES.
    """
    out = bytearray()
    seen: set[str] = set()
    for inode, entry in enumerate([*entries, Entry(_TRAILER, 0)], start=1):
        if not entry.name or entry.name.startswith("/") or "\0" in entry.name or entry.name in seen:
            raise ValueError(f"bad name in archive: {entry.name!r}")
        seen.add(entry.name)
        out += _header(inode, entry)
        out += entry.name.encode() + b"\0"
        out += b"\0" * (-len(out) % 4)
        out += entry.data
        out += b"\0" * (-len(out) % 4)
    return bytes(out)


def _header(inode: int, entry: Entry) -> bytes:
    size = check_size(entry.name, len(entry.data))
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    # inode mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
    fields = (inode, entry.mode, 0, 0, links, 0, size, 0, 0, 0, 0, len(entry.name.encode()) + 1, 0)
    return b"070701" + b"".join(b"%08X" % field for field in fields)


def check_size(name: str, size: int) -> int:
    """Return *size*. Raises ValueError if the format cannot store a file of that size."""
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{name} has {size} bytes, but a cpio entry holds at most {MAX_FILE_BYTES}")
    return size
