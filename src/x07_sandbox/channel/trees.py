"""File trees as a byte stream: input files, and the changes that a program made.

A stream is a sequence of records; numbers are big endian:

    kind         u8
    name         u16 length, then bytes: the path below the tree's root; empty for the root itself
    FOLDER       mode u16, mtime i64 (ns since 1970)
    FILE         mode u16, mtime i64, size u64, then segments that add up to the size, each a u64 (top bit: hole;
                 the rest: length) and, unless it is a hole, that many bytes
    LINK         mtime i64, u16 length, then the target
    DELETED      nothing
    UNSUPPORTED  mode u16 with the file type. It stands for a device, socket or pipe, for anything with extended
                 attributes, or for a folder that is nested too deep
    TOO_LARGE    mode u16, size u64: a file whose content is not sent
    ROOT         nothing; its name is the decimal number of the tree that the following records belong to
    END          nothing; the last record

The guest is hostile: names, depths and sizes are bounded here, and no name leaves its tree. The caller limits the
number of records. The caller decides which kinds of records it accepts.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from x07_sandbox.errors import PeerError

NAME_MAX: Final = 4095  # PATH_MAX without its NUL
PART_MAX: Final = 255
DEPTH_MAX: Final = 1024
SIZE_MAX: Final = 1 << 40
_HOLE: Final = 1 << 63
_HEAD: Final = struct.Struct(">BH")
_LINK: Final = struct.Struct(">qH")
_MTIME_MAX: Final = (1 << 63) - 1  # the year 2262; file systems may hold later times
_SEGMENT: Final = struct.Struct(">Q")


class Kind(enum.IntEnum):
    """The kind of a record."""

    FOLDER = 1
    FILE = 2
    LINK = 3
    DELETED = 4
    UNSUPPORTED = 5
    ROOT = 6
    END = 7
    TOO_LARGE = 8


class Entry(NamedTuple):
    """Event: one record. mode: the permission bits, and for UNSUPPORTED also the file type."""

    kind: Kind
    name: bytes
    mode: int = 0
    mtime_ns: int = 0
    size: int = 0
    target: bytes = b""

    def encoded(self) -> bytes:
        """Encode the record; a file's segments follow separately. Raises struct.error if a value does not fit."""
        head = _HEAD.pack(self.kind, len(self.name)) + self.name
        mtime_ns = max(-_MTIME_MAX, min(self.mtime_ns, _MTIME_MAX))
        if self.kind is Kind.LINK:
            return head + _LINK.pack(mtime_ns, len(self.target)) + self.target
        layout, names = _FIELDS.get(self.kind, _NO_FIELDS)
        values = {"mode": self.mode, "mtime_ns": mtime_ns, "size": self.size}
        return head + layout.pack(*[values[name] for name in names])


# The fixed fields after the name, which have the names of `Entry`.
_NO_FIELDS: Final[tuple[struct.Struct, tuple[str, ...]]] = struct.Struct(""), ()
_FIELDS: Final = {
    Kind.FOLDER: (struct.Struct(">Hq"), ("mode", "mtime_ns")),
    Kind.FILE: (struct.Struct(">HqQ"), ("mode", "mtime_ns", "size")),
    Kind.UNSUPPORTED: (struct.Struct(">H"), ("mode",)),
    Kind.TOO_LARGE: (struct.Struct(">HQ"), ("mode", "size")),
    Kind.LINK: (_LINK, ()),
}


class Piece(NamedTuple):
    """Event: bytes of the current file."""

    data: bytes


class Hole(NamedTuple):
    """Event: a hole of *size* bytes in the current file."""

    size: int


class FileEnd:
    """Event: the current file is complete."""


Event = Entry | Piece | Hole | FileEnd


def segment(size: int, *, hole: bool = False) -> bytes:
    """Encode the header of a file segment."""
    return _SEGMENT.pack(size | _HOLE if hole else size)


class Reader:
    """Incremental decoder of a tree stream."""

    def __init__(self) -> None:
        self.ended = False
        self._buffer = bytearray()
        self._file_left = -1  # bytes left of the current file; -1: none
        self._segment_left = 0

    def feed(self, data: bytes) -> Iterator[Event]:
        """Yield the events that *data* completes; exhaust the iterator before the next call. Raises PeerError."""
        self._buffer += data
        view, at = memoryview(bytes(self._buffer)), 0
        self._buffer.clear()
        while at < len(view) or self._file_left == 0:
            if self._file_left == 0:
                self._file_left = -1
                yield FileEnd()
                continue
            if self.ended:
                raise _bad("data after the end")
            if self._segment_left:
                piece = bytes(view[at : at + self._segment_left])
                at += len(piece)
                self._segment_left -= len(piece)
                self._file_left -= len(piece)
                yield Piece(piece)
                continue
            step = self._segment(view, at) if self._file_left > 0 else self._entry(view, at)
            if step is None:
                break
            event, at = step
            if event is not None:
                yield event
        self._buffer += view[at:]

    def _segment(self, view: memoryview, at: int) -> tuple[Hole | None, int] | None:
        if len(view) - at < _SEGMENT.size:
            return None
        (word,) = _SEGMENT.unpack_from(view, at)
        size = word & ~_HOLE
        if not 0 < size <= self._file_left:
            raise _bad("a segment exceeds its file")
        at += _SEGMENT.size
        if not word & _HOLE:
            self._segment_left = size
            return None, at
        self._file_left -= size
        return Hole(size), at

    def _entry(self, view: memoryview, at: int) -> tuple[Entry, int] | None:
        found = _head(view, at)
        if found is None:
            return None
        kind, name, rest = found
        if kind is Kind.LINK:
            return _link(view, rest, name)
        layout, names = _FIELDS.get(kind, _NO_FIELDS)
        entry = Entry(kind, name, **dict(zip(names, layout.unpack_from(view, rest), strict=True)))
        self.ended = kind is Kind.END
        if kind is Kind.FILE:
            if entry.size > SIZE_MAX:
                raise _bad("a file is too large")
            self._file_left = entry.size
        return entry, rest + layout.size


def _head(view: memoryview, at: int) -> tuple[Kind, bytes, int] | None:
    """Return a record's kind, its verified name and the offset of its other fields, or None if it is incomplete."""
    if len(view) - at < _HEAD.size:
        return None
    number, length = _HEAD.unpack_from(view, at)
    kind = _KINDS.get(number)
    if kind is None:
        raise _bad(f"unknown record {number}")
    if length > NAME_MAX:
        raise _bad("a name is too long")
    at += _HEAD.size
    rest = at + length
    if len(view) - rest < _FIELDS.get(kind, _NO_FIELDS)[0].size:
        return None
    name = bytes(view[at:rest])
    if kind is Kind.ROOT:
        if not (name.isdigit() and len(name) <= _ROOT_DIGITS):
            raise _bad("ROOT without a number")
    elif kind is Kind.END and name:
        raise _bad("END with a name")
    else:
        check_name(name)
    return kind, name, rest


def _link(view: memoryview, at: int, name: bytes) -> tuple[Entry, int] | None:
    mtime_ns, size = _LINK.unpack_from(view, at)
    at += _LINK.size
    if not 0 < size <= NAME_MAX:
        raise _bad("a link target is empty or too long")
    if len(view) - at < size:
        return None
    target = bytes(view[at : at + size])
    if b"\0" in target:
        raise _bad("a link target contains a NUL byte")
    return Entry(Kind.LINK, name, mtime_ns=mtime_ns, target=target), at + size


_ROOT_DIGITS: Final = 3
_KINDS: Final = {int(kind): kind for kind in Kind}


def check_name(name: bytes) -> bytes:
    """Return *name* if it is a relative path without empty, "." and ".." parts. Raises PeerError."""
    if not name:
        return name
    parts = name.split(b"/")
    if len(name) > NAME_MAX or len(parts) > DEPTH_MAX or b"\0" in name:
        raise _bad("a name is too long, too deep, or contains a NUL byte")
    for part in parts:
        if not part or len(part) > PART_MAX or part in {b".", b".."}:
            raise _bad("a name leaves its tree, or has an empty or overlong part")
    return name


def can_hold_names(name: bytes) -> bool:
    """Return whether entries of the folder *name* have paths within the limits of a tree stream and of the kernel."""
    return len(name) + PART_MAX + 1 < NAME_MAX - 256 and name.count(b"/") + 2 < DEPTH_MAX


def _bad(why: str) -> PeerError:
    return PeerError("bad file tree", why)
