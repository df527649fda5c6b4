"""What comes from a guest as a tree stream (channel/trees): the changes that it reports, or a whole folder.

Changes are bounded and stored, but not trusted. Contents go to one file and everything else to a list. `check_changes`
decides which changes are allowed. `pack` packs a folder that goes to a guest.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, Self

import msgspec

from x07_sandbox.channel import trees
from x07_sandbox.channel.contents import parts
from x07_sandbox.channel.trees import (
    Entry,
    Event,
    FileEnd,
    Hole,
    Kind,
    Piece,
    Reader,
    can_hold_names,
    entry_of,
    segment_of,
    walk,
)
from x07_sandbox.errors import BackendError, PeerError
from x07_sandbox.files.changes import Node
from x07_sandbox.files.inode import add_zeros, write
from x07_sandbox.host.paths import closing_fd, raised_as

if TYPE_CHECKING:
    from types import TracebackType


_PERMISSIONS: Final = 0o7777

ENTRIES_MAX: Final = 1_000_000
BYTES_MAX: Final = 64 << 30
_NAMES_MAX: Final = 256 << 20  # bytes of the names of folders, which are kept in memory
_MODE: Final = 0o777  # no set-id bits come from a guest
_LEFT_OUT_MAX: Final = 100  # names


class ReportedEntry(msgspec.Struct, frozen=True, kw_only=True):
    """An entry of root number *root*. node: None if it was removed. other: mode of an entry that a tree cannot hold."""

    root: int
    name: str
    node: Node | None = None
    other: int | None = None


class Incoming:
    """Receiver of the stream of changes to *roots* roots. Contents go to *data_fd*, which the caller owns.

    most_entries, most_bytes: limits for all roots together. Holes count as bytes, which limits the time for hashing.
    problem: why a part of the stream was rejected; else empty. too_many: whether the stream has too many entries.
    """

    def __init__(self, data_fd: int, *, roots: int, most_entries: int, most_bytes: int) -> None:
        self.reported: list[ReportedEntry] = []
        self.problem = ""
        self.too_many = False
        self.size = 0
        self._data_fd = data_fd
        self._roots = roots
        self._entries_left = most_entries
        self._most_bytes = most_bytes
        self._reader = Reader()
        self._root = -1
        self._entry: Entry | None = None
        self._hash = hashlib.sha256()
        self._at = 0
        self._position = 0

    @property
    def complete(self) -> bool:
        """Whether the whole stream was accepted."""
        return self._reader.ended and not self.problem

    def take(self, data: bytes) -> bool:
        """Take the next bytes of the stream; return False once there is a problem. Raises PeerError, BackendError."""
        if self.problem:
            return False
        fix = "Free disk space, or set X07_VM_STATE_DIR to a folder on a larger disk"
        with raised_as(BackendError, "cannot save the program's changes", fix):
            self._take(self._reader.feed(data))
        return not self.problem

    def _take(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, Piece):
                self._hash.update(event.data)
                self._position = write(self._data_fd, event.data, self._position)
            elif isinstance(event, Hole):
                add_zeros(self._hash, event.size)
                self._position += event.size
            elif isinstance(event, FileEnd):
                entry = self._entry
                assert entry is not None
                node = Node(kind="file", mode=entry.mode, size=entry.size, sha256=self._hash.hexdigest(), at=self._at)
                self.reported.append(ReportedEntry(root=self._root, name=os.fsdecode(entry.name), node=node))
            else:
                self._begin(event)
            if self.problem:
                return

    def _begin(self, entry: Entry) -> None:
        name = os.fsdecode(entry.name)
        if entry.kind is Kind.END:
            os.ftruncate(self._data_fd, self._position)  # the last file may end in a hole
            return
        if entry.kind is Kind.ROOT:
            if not self._root < int(name) < self._roots:
                raise PeerError("bad changes", f"root {int(name)} does not exist or is out of order")
            self._root = int(name)
            return
        if self._root < 0:
            raise PeerError("bad changes", "there is an entry before the first root")
        self._entries_left -= 1
        if entry.mode & ~_PERMISSIONS and entry.kind is not Kind.UNSUPPORTED:
            raise PeerError("bad changes", "a mode has more than permission bits")
        if self._entries_left < 0:
            self.too_many = True
            self.problem = "the program changed more entries than the policy allows (fs.max_entries)"
            return
        if entry.kind is Kind.FILE:
            self.size += entry.size
            if self.size > self._most_bytes:
                self.problem = f"the changed files are larger than {self._most_bytes >> 20} MiB"
                return
            self._entry, self._hash, self._at = entry, hashlib.sha256(), self._position
            return
        other = entry.mode if entry.kind is Kind.UNSUPPORTED else None
        self.reported.append(ReportedEntry(root=self._root, name=name, node=_node(entry), other=other))


def _node(entry: Entry) -> Node | None:
    if entry.kind is Kind.FOLDER:
        return Node(kind="folder", mode=entry.mode)
    if entry.kind is Kind.TOO_LARGE:
        return Node(kind="file", mode=entry.mode, size=entry.size)
    if entry.kind is Kind.LINK:
        return Node(kind="link", target=os.fsdecode(entry.target))
    return None


def pack(folder: Path, out: IO[bytes]) -> None:
    """Write the stream of a folder with all that is in it to *out*. Raises OSError.

    Links are packed as links. Sockets, devices and pipes are left out.
    """

    def enters(name: bytes) -> bool:
        if not can_hold_names(name):  # a folder that the guest can neither create nor send back
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), os.fspath(folder))
        return True

    def failed(name: bytes, exc: OSError) -> None:
        raise OSError(exc.errno, exc.strerror, os.fspath(folder / os.fsdecode(name)))

    with closing_fd(os.open(folder, trees.FOLDER_FLAGS)) as top:
        for found in walk(top, enters=enters, failed=failed):
            if stat.S_ISREG(found.info.st_mode):
                with closing_fd(found.open()) as fd:
                    entry = entry_of(found.name, os.fstat(fd), _MODE)
                    out.write(entry.encoded())
                    out.writelines(map(segment_of, parts(fd, entry.size)))
                continue
            target = found.target() if stat.S_ISLNK(found.info.st_mode) else b""
            entry = entry_of(found.name, found.info, _MODE, target)
            if entry.kind is not Kind.UNSUPPORTED:
                out.write(entry.encoded())
    out.write(Entry(Kind.END, b"").encoded())


class Unpacker(trees.Unpacker):
    """Creates a folder from a guest's stream, as the caller's user. Nothing is written outside the folder.

    left_out: what the guest could not send whole, at most 100 names; more_left_out: how many more. The folder must not
    exist yet. Links are created as links and never followed. Modes lose their set-id bits. If the context ends by an
    exception, what was created stays.
    """

    def __init__(self, folder: Path) -> None:
        self.left_out: list[str] = []
        self.more_left_out = 0
        self._entries = self._bytes = self._names = 0
        folder.mkdir(mode=0o700)
        super().__init__(os.open(folder, trees.FOLDER_FLAGS | os.O_NOFOLLOW), _MODE)

    def write(self, data: bytes) -> None:
        """Take the next bytes of the stream. Raises PeerError, BackendError, OSError."""
        super().write(data)
        if self.ended:
            self.finish()

    def _make(self, entry: Entry) -> None:
        self._entries += 1
        self._bytes += entry.size if entry.kind is Kind.FILE else 0
        self._names += len(entry.name) if entry.kind is Kind.FOLDER else 0
        if self._entries > ENTRIES_MAX or self._bytes > BYTES_MAX or self._names > _NAMES_MAX:
            why = f"it has more than {ENTRIES_MAX} entries or {BYTES_MAX >> 30} GiB"
            raise BackendError("cannot copy the folder", why, "Copy smaller folders")
        super()._make(entry)

    def _refuse(self, entry: Entry) -> None:
        if entry.kind is not Kind.UNSUPPORTED:
            super()._refuse(entry)
        elif stat.S_ISSOCK(entry.mode) or stat.S_ISFIFO(entry.mode):
            return  # nobody misses it
        elif len(self.left_out) < _LEFT_OUT_MAX:
            self.left_out.append(os.fsdecode(entry.name))
        else:
            self.more_left_out += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
