"""Receiver of the changes that a guest reports. The changes are bounded and stored, but not trusted.

Contents go to one file and everything else to a list. `check_changes` decides which changes are allowed.
"""

import hashlib
import os
from collections.abc import Iterable
from typing import Final

import msgspec

from x07_sandbox.channel.trees import Entry, Event, FileEnd, Hole, Kind, Piece, Reader
from x07_sandbox.errors import BackendError, PeerError
from x07_sandbox.files.changes import Node
from x07_sandbox.files.contents import add_zeros, write

_PERMISSIONS: Final = 0o7777


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
        try:
            self._take(self._reader.feed(data))
        except OSError as exc:
            fix = "Free disk space, or set X07_VM_STATE_DIR to a folder on a larger disk"
            raise BackendError("cannot save the program's changes", exc.strerror or str(exc), fix) from exc
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
                assert entry is not None  # noqa: S101 - for the type checker
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
