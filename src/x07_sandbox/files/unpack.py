"""Whole folders as tree streams (channel/trees): packing one of the host's, and unpacking one from a guest."""

from __future__ import annotations

import errno
import os
import stat
import struct
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, Self

from x07_sandbox.channel.contents import parts
from x07_sandbox.channel.trees import Entry, FileEnd, Hole, Kind, Piece, Reader, segment
from x07_sandbox.errors import BackendError, PeerError
from x07_sandbox.host import beneath
from x07_sandbox.host.linux import fd_path
from x07_sandbox.host.paths import closing_fd
from x07_sandbox.host.waiting import write_all

if TYPE_CHECKING:
    from types import TracebackType

ENTRIES_MAX: Final = 1_000_000
BYTES_MAX: Final = 64 << 30
_NAMES_MAX: Final = 256 << 20  # bytes of the names of folders, which are kept in memory
_MODE: Final = 0o777  # no set-id bits come from a guest
_MINE: Final = 0o700
_LEFT_OUT_MAX: Final = 100  # names


def pack(folder: Path, out: IO[bytes]) -> None:
    """Write the stream of a folder with all that is in it to *out*. Raises OSError.

    Links are packed as links. Sockets, devices and pipes are left out.
    """
    try:
        _pack(os.fsencode(folder), out)
    except struct.error:  # a name is longer than a record can say
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), os.fspath(folder)) from None


def _pack(top: bytes, out: IO[bytes]) -> None:
    for path, folders, names, folder_fd in os.fwalk(top, onerror=_raise):
        below = os.path.relpath(path, top)
        info = os.fstat(folder_fd)
        name = b"" if below == b"." else below
        out.write(Entry(Kind.FOLDER, name, mode=info.st_mode & _MODE, mtime_ns=info.st_mtime_ns).encoded())
        for part in sorted(names + folders):
            _pack_one(folder_fd, part, name + b"/" * bool(name) + part, out)
    out.write(Entry(Kind.END, b"").encoded())


def _raise(exc: OSError) -> None:
    raise exc


def _pack_one(folder_fd: int, part: bytes, name: bytes, out: IO[bytes]) -> None:
    info = os.stat(part, dir_fd=folder_fd, follow_symlinks=False)
    if stat.S_ISLNK(info.st_mode):
        target = os.readlink(part, dir_fd=folder_fd)
        out.write(Entry(Kind.LINK, name, mtime_ns=info.st_mtime_ns, target=target).encoded())
    elif stat.S_ISREG(info.st_mode):
        with closing_fd(os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder_fd)) as fd:
            info = os.fstat(fd)
            mode, size = info.st_mode & _MODE, info.st_size
            out.write(Entry(Kind.FILE, name, mode=mode, mtime_ns=info.st_mtime_ns, size=size).encoded())
            for data in parts(fd, size):
                out.write(segment(data, hole=True) if isinstance(data, int) else segment(len(data)) + data)


class Unpacker:
    """Creates a folder from a guest's stream, as the caller's user. Nothing is written outside the folder.

    left_out: what the guest could not send whole, at most 100 names; more_left_out: how many more. The folder must not
    exist yet. Links are created as links and never followed. Modes lose their set-id bits. If the context ends by an
    exception, what was created stays.
    """

    def __init__(self, folder: Path) -> None:
        self.ended = False
        self.left_out: list[str] = []
        self.more_left_out = 0
        self._reader = Reader()
        self._entries = self._bytes = self._names = 0
        self._fd = -1
        self._entry: Entry | None = None
        self._folders: dict[str, Entry] = {}
        folder.mkdir(mode=_MINE)
        self._top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def write(self, data: bytes) -> None:
        """Take the next bytes of the stream. Raises PeerError, BackendError, OSError."""
        for event in self._reader.feed(data):
            if isinstance(event, Piece):
                self._count(len(event.data))
                write_all(self._fd, event.data)
            elif isinstance(event, Hole):
                self._count(event.size)
                os.lseek(self._fd, event.size, os.SEEK_CUR)
            elif isinstance(event, FileEnd):
                self._close_file()
            else:
                self._make(event)
        self.ended = self._reader.ended
        if self.ended:
            self._finish()

    def _count(self, size: int) -> None:
        self._bytes += size
        self._entries += not size
        if self._entries > ENTRIES_MAX or self._bytes > BYTES_MAX or self._names > _NAMES_MAX:
            why = f"it has more than {ENTRIES_MAX} entries or {BYTES_MAX >> 30} GiB"
            raise BackendError("cannot copy the folder", why, "Copy smaller folders")

    def _make(self, entry: Entry) -> None:
        if entry.kind is Kind.END:
            return
        self._count(0)
        name = os.fsdecode(entry.name)
        if entry.kind is Kind.FOLDER and not name:
            self._folders[""] = entry
        elif not name or entry.kind not in {Kind.FOLDER, Kind.FILE, Kind.LINK}:
            if entry.kind is not Kind.UNSUPPORTED:
                raise PeerError("bad file tree", f"it has a record of the kind {entry.kind.name}")
            if not stat.S_ISSOCK(entry.mode) and not stat.S_ISFIFO(entry.mode):  # else nobody misses it
                self._leave_out(name)
        else:
            with beneath.parent_of(self._top, name) as (parent, part):
                self._make_in(parent, part, name, entry)

    def _leave_out(self, name: str) -> None:
        if len(self.left_out) < _LEFT_OUT_MAX:
            self.left_out.append(name)
        else:
            self.more_left_out += 1

    def _make_in(self, parent: int, part: str, name: str, entry: Entry) -> None:
        if entry.kind is Kind.FOLDER:
            os.mkdir(part, _MINE, dir_fd=parent)
            self._names += len(name)
            self._folders[name] = entry
        elif entry.kind is Kind.LINK:
            os.symlink(entry.target, part, dir_fd=parent)
        else:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd, self._entry = os.open(part, flags, 0o600, dir_fd=parent), entry

    def _close_file(self) -> None:
        entry = self._entry
        assert entry is not None  # noqa: S101 - a file is open
        os.ftruncate(self._fd, entry.size)  # it may end in a hole
        os.fchmod(self._fd, entry.mode & _MODE)
        os.utime(self._fd, ns=(entry.mtime_ns, entry.mtime_ns))
        os.close(self._fd)
        self._fd = -1

    def _finish(self) -> None:
        """Set the modes and times of folders, inner ones first: creating their entries needs and changes them."""
        for name, entry in reversed(self._folders.items()):
            with closing_fd(beneath.look(self._top, name or ".")) as fd:
                place = Path(fd_path(fd))
                place.chmod(entry.mode & _MODE)
                os.utime(place, ns=(entry.mtime_ns, entry.mtime_ns))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fd in (self._fd, self._top):
            if fd >= 0:
                os.close(fd)
