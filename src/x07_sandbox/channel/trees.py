"""File trees as a byte stream, the walk through a folder that is packed, and the creation of what a stream contains.

Everything that travels as a tree has this form: a program's files, copies of host folders, changes, uploads. A stream
is a sequence of records; numbers are big endian:

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

An mtime of NO_TIME stands for none. The guest is hostile: names, depths and sizes are bounded here, and no name leaves
its tree. The caller limits the number of records. The caller decides which kinds of records it accepts.
"""

from __future__ import annotations

import enum
import errno
import os
import stat
import struct
from collections.abc import Callable, Iterator
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
NO_TIME: Final = -(1 << 63)
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
    mtime_ns: int = NO_TIME
    size: int = 0
    target: bytes = b""

    def encoded(self) -> bytes:
        """Encode the record; a file's segments follow separately. Raises struct.error if a value does not fit."""
        head = _HEAD.pack(self.kind, len(self.name)) + self.name
        mtime_ns = self.mtime_ns if self.mtime_ns == NO_TIME else max(-_MTIME_MAX, min(self.mtime_ns, _MTIME_MAX))
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


def segment_of(part: bytes | int) -> bytes:
    """Encode a part of a file (channel/contents): its bytes, or the length of a hole."""
    return segment(part, hole=True) if isinstance(part, int) else segment(len(part)) + part


def file_record(name: bytes, content: bytes, mode: int = 0o644, mtime_ns: int = NO_TIME) -> bytes:
    """Encode a file whose content is in memory."""
    head = Entry(Kind.FILE, name, mode=mode, mtime_ns=mtime_ns, size=len(content)).encoded()
    return head + segment_of(content) if content else head


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


# Errors of calls on an entry that another process removes or replaces at this moment.
CHANGED: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EINVAL, errno.ENXIO})
TRIES: Final = 3
FOLDER_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_WAY_FLAGS: Final = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MINE: Final = 0o700


def entry_of(name: bytes, info: os.stat_result, mask: int, target: bytes = b"") -> Entry:
    """Return the record of a file, folder or link with this status; else UNSUPPORTED. mask: of the mode."""
    kind = _OF_TYPES.get(stat.S_IFMT(info.st_mode), Kind.UNSUPPORTED)
    if kind is Kind.UNSUPPORTED:
        return Entry(kind, name, mode=info.st_mode)
    return Entry(kind, name, info.st_mode & mask, info.st_mtime_ns, info.st_size, target)


_OF_TYPES: Final = {stat.S_IFDIR: Kind.FOLDER, stat.S_IFREG: Kind.FILE, stat.S_IFLNK: Kind.LINK}


class Found(NamedTuple):
    """An entry that a walk has found. name: below the top; empty for the top itself.

    fd: of a folder, open; else -1. folder_fd, part: the open folder with the entry, and its name there. Descriptors
    hold until the next entry.
    """

    name: bytes
    info: os.stat_result
    fd: int
    folder_fd: int
    part: bytes

    @property
    def path(self) -> bytes:
        """A path to the entry, which leads through its open folder."""
        return b"/proc/self/fd/%d/%s" % (self.folder_fd, self.part)

    def open(self) -> int:
        """Open this file for reading, without following a link or waiting for a pipe. Raises OSError."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        return os.open(self.part, flags, dir_fd=self.folder_fd)

    def target(self) -> bytes:
        """Return the target of this link. Raises OSError."""
        return os.readlink(self.part, dir_fd=self.folder_fd)


def open_folder(top_fd: int, name: bytes, flags: int = FOLDER_FLAGS) -> int:
    """Open the folder *name* below an open one, or that one again, without following a link. Raises OSError."""
    fd = os.dup(top_fd) if not name else top_fd
    parts = name.split(b"/") if name else []
    for number, part in enumerate(parts, start=1):
        outer = fd
        try:
            fd = os.open(part, _WAY_FLAGS if number < len(parts) else flags | os.O_NOFOLLOW, dir_fd=outer)
        finally:
            if outer != top_fd:
                os.close(outer)
    return fd


def walk(
    top_fd: int,
    *,
    wanted: Callable[[int, bytes], bool] = lambda _folder_fd, _name: True,
    enters: Callable[[bytes], bool] = can_hold_names,
    failed: Callable[[bytes, OSError], None] | None = None,
    one_disk: bool = False,
) -> Iterator[Found]:
    """Yield the folder *top_fd* and everything in it, sorted, each folder before its entries. Raises OSError.

    No link is followed, and each entry is looked up in its open folder, since other processes may replace entries at
    any moment. However deep the folders are, few of them are open. The caller closes *top_fd* after the walk.

    wanted: whether to look at an entry, given its open folder and its name. enters: whether to list a folder.
    failed: called for an entry that cannot be read, except one that was just removed. By default, the error is raised,
    except for an entry that was just removed or replaced.
    one_disk: whether a folder on another file system is an error (EXDEV).
    """
    device = os.fstat(top_fd).st_dev if one_disk else None
    waiting, fd, here = [b""], top_fd, b""  # names, the next one last; the folder opened last, and its name
    try:
        while waiting:
            name = waiting.pop()
            above, _, part = name.rpartition(b"/")
            inner = -1
            try:
                if name and above != here:
                    fd, here = _instead(fd, top_fd, open_folder(top_fd, above)), above
                if name and not wanted(fd, name):
                    continue
                found = _look(fd, part, name, device) if name else Found(b"", os.fstat(fd), fd, fd, b".")
                inner = found.fd
                yield found
                if inner >= 0 and enters(name):
                    parts = map(os.fsencode, os.listdir(inner))  # noqa: PTH208 - of a descriptor
                    waiting += sorted((name + b"/" + one if name else one for one in parts), reverse=True)
                    fd, here, inner = _instead(fd, top_fd, inner), name, -1
            except OSError as exc:
                if failed is not None and exc.errno != errno.ENOENT:
                    failed(name, exc)
                elif exc.errno not in CHANGED:
                    raise
            finally:
                if inner not in {-1, top_fd}:
                    os.close(inner)
    finally:
        _instead(fd, top_fd, top_fd)


def _instead(fd: int, top_fd: int, new_fd: int) -> int:
    """Close *fd* unless it is the top, and return *new_fd*."""
    if fd not in {top_fd, new_fd}:
        os.close(fd)
    return new_fd


def _look(folder_fd: int, part: bytes, name: bytes, device: int | None) -> Found:
    left = TRIES
    while stat.S_ISDIR((info := os.stat(part, dir_fd=folder_fd, follow_symlinks=False)).st_mode):
        left -= 1
        try:
            fd = os.open(part, FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=folder_fd)
        except OSError as exc:
            if exc.errno not in CHANGED or not left:
                raise
            continue
        info = os.fstat(fd)
        if device not in {None, info.st_dev}:
            os.close(fd)
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return Found(name, info, fd, folder_fd, part)
    return Found(name, info, -1, folder_fd, part)


class Unpacker:
    """Creates what a stream contains in the empty folder *top_fd*, which it closes, and nothing outside of it.

    Each entry is created in its open folder, and no link is followed. mask: of the modes. ended: whether the stream
    has ended. A subclass may refuse entries, or note them.
    """

    def __init__(self, top_fd: int, mask: int) -> None:
        self.ended = False
        self._top = self._here_fd = top_fd
        self._here = b""
        self._mask = mask
        self._reader = Reader()
        self._folders: dict[bytes, Entry] = {}
        self._fd = -1
        self._entry: Entry | None = None

    def write(self, data: bytes) -> None:
        """Take the next bytes of the stream. Raises PeerError, OSError."""
        for event in self._reader.feed(data):
            if isinstance(event, Piece):
                view = memoryview(event.data)
                while view:
                    view = view[os.write(self._fd, view) :]
            elif isinstance(event, Hole):
                os.lseek(self._fd, event.size, os.SEEK_CUR)
            elif isinstance(event, FileEnd):
                self._close_file()
            elif event.kind is not Kind.END:
                self._make(event)
        self.ended = self._reader.ended

    def finish(self) -> None:
        """Set modes and times of folders, inner ones first: creating entries needs and changes them. Raises OSError."""
        for entry in reversed(self._folders.values()):
            self._finish_folder(entry)
        self.close()

    def close(self) -> None:
        """Close all descriptors. What was created stays."""
        for fd in {self._fd, self._here_fd, self._top} - {-1}:
            os.close(fd)
        self._fd = self._here_fd = self._top = -1

    def _refuse(self, entry: Entry) -> None:
        """Refuse a record that is no file, folder or link. Raises PeerError."""
        raise _bad(f"it has a record of the kind {entry.kind.name}")

    def _created(self, name: bytes, inode: int) -> None:
        """Note a file or link."""

    def _make(self, entry: Entry) -> None:
        name, kind = entry.name, entry.kind
        if kind is Kind.FOLDER and not name:
            self._folders[name] = entry
        elif kind not in {Kind.FOLDER, Kind.FILE, Kind.LINK} or not name:
            self._refuse(entry)
        else:
            folder_fd, part = self._place(name)
            if kind is Kind.FOLDER:
                os.mkdir(part, entry.mode & self._mask | _MINE, dir_fd=folder_fd)
                self._folders[name] = entry
            elif kind is Kind.FILE:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                self._fd, self._entry = os.open(part, flags, 0o600, dir_fd=folder_fd), entry
            else:
                os.symlink(entry.target, part, dir_fd=folder_fd)
                if entry.mtime_ns != NO_TIME:
                    os.utime(part, ns=(entry.mtime_ns,) * 2, dir_fd=folder_fd, follow_symlinks=False)
                self._created(name, os.stat(part, dir_fd=folder_fd, follow_symlinks=False).st_ino)

    def _place(self, name: bytes) -> tuple[int, bytes]:
        """Return the open folder of a name, and the last part of the name. Raises OSError."""
        above, _, part = name.rpartition(b"/")
        if above != self._here:
            fd = open_folder(self._top, above, _WAY_FLAGS) if above else self._top
            self._here_fd, self._here = _instead(self._here_fd, self._top, fd), above
        return self._here_fd, part

    def _close_file(self) -> None:
        entry, fd = self._entry, self._fd
        assert entry is not None  # a file is open
        info = os.fstat(fd)
        if info.st_size < entry.size:  # it ends with a hole
            os.ftruncate(fd, entry.size)
        os.fchmod(fd, entry.mode & self._mask)
        if entry.mtime_ns != NO_TIME:
            os.utime(fd, ns=(entry.mtime_ns,) * 2)
        os.close(fd)
        self._fd = -1
        self._created(entry.name, info.st_ino)

    def _finish_folder(self, entry: Entry) -> None:
        mode, times = entry.mode & self._mask, (entry.mtime_ns,) * 2
        if not entry.name:
            os.fchmod(self._top, mode)
            if entry.mtime_ns != NO_TIME:
                os.utime(self._top, ns=times)
            return
        folder_fd, part = self._place(entry.name)
        os.chmod(part, mode, dir_fd=folder_fd)
        if entry.mtime_ns != NO_TIME:
            os.utime(part, ns=times, dir_fd=folder_fd, follow_symlinks=False)
