"""Requests about files in a sandbox, and their answers, over the standard streams of the file server in the guest.

A request or an answer is its length (u32, big endian) and a JSON array. After WRITE come its bytes, and after PUT a
tree (channel/trees). After a successful answer to READ come the bytes, or the segments of a file in a tree, and after
one to GET a tree. Requests are answered in order. The server runs as the program's user in the program's namespaces,
so a request reaches what a program reaches. The guest is hostile: answers are bounded here.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from x07_sandbox.errors import PeerError

MESSAGE_MAX: Final = 8 << 20
ENTRIES_MAX: Final = 100_000
MODE_MAX: Final = 0o177777
_LENGTH: Final = struct.Struct(">I")
NUMBER_MAX: Final = 2**63 - 1
_ERRNO_MAX: Final = 4096

READ: Final = "read"
WRITE: Final = "write"
STAT: Final = "stat"
LIST: Final = "list"
MAKE: Final = "make"
REMOVE: Final = "remove"
PUT: Final = "put"
GET: Final = "get"


class Request(NamedTuple):
    """A request. path: absolute, or relative to the server's working folder.

    offset, size: for READ, the part to read. For WRITE and PUT, *size* is the size of the content that follows. mode:
    permission bits for WRITE and MAKE; -1 for the default. whole: for READ, read to the end of the file, and answer in
    segments, so that holes are not sent; for MAKE, also make parent folders and accept an existing folder; for REMOVE,
    also remove what is in a folder; for STAT, do not follow a link.
    """

    kind: str
    path: str
    offset: int = 0
    size: int = 0
    mode: int = -1
    whole: bool = False


class FileInfo(NamedTuple):
    """A file, folder or other entry. mode: with the file type (inode(7)).

    target: the target of a symbolic link, else "".
    """

    name: str
    mode: int
    size: int
    mtime_ns: int
    target: str


class Answer(NamedTuple):
    """An answer. errno: 0 for success. size: bytes that follow an answer to READ. entries: for STAT and LIST."""

    errno: int
    size: int = 0
    entries: tuple[FileInfo, ...] = ()


def encode(message: Request | Answer) -> bytes:
    """Encode a request or an answer. Lone surrogates, which stand for undecodable bytes, become JSON escapes."""
    data = json.dumps(message, separators=(",", ":")).encode("ascii")
    return _LENGTH.pack(len(data)) + data


class Buffer:
    """A buffer of received bytes, from which messages and their content are taken."""

    def __init__(self) -> None:
        self.data = bytearray()

    def take(self) -> list[Any] | None:
        """Remove and return the first message, or None if more bytes are needed. Raises PeerError."""
        if len(self.data) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self.data)
        if length > MESSAGE_MAX:
            raise _bad(f"it has {length} bytes")
        end = _LENGTH.size + length
        if len(self.data) < end:
            return None
        try:
            values = json.loads(self.data[_LENGTH.size : end])
        except (ValueError, RecursionError) as exc:
            raise _bad(f"invalid JSON ({type(exc).__name__})") from None
        del self.data[:end]
        if not isinstance(values, list):
            raise _bad("it is not an array")
        return values

    def piece(self, most: int) -> bytes:
        """Remove and return at most *most* bytes."""
        with memoryview(self.data) as view:
            data = bytes(view[:most])
        del self.data[: len(data)]
        return data


def answer_of(values: list[Any]) -> Answer:
    """Return the answer in a message of the guest. Raises PeerError."""
    number, size, entries = _checked(values, (_errno, _number, _list), "answer")
    infos = tuple(FileInfo(*_checked(one, (_name, _mode, _number, _time, _name), "entry")) for one in entries)
    return Answer(number, size, infos)


def _checked(values: Any, checks: tuple[Callable[[Any], bool], ...], what: str) -> list[Any]:  # noqa: ANN401
    if not isinstance(values, list) or len(values) != len(checks):
        raise _bad(f"an {what} has the wrong number of fields")
    for value, check in zip(values, checks, strict=True):
        if not check(value):
            raise _bad(f"a field of an {what} is out of range")
    return values


def _number(value: object) -> bool:
    return type(value) is int and 0 <= value <= NUMBER_MAX


def _mode(value: object) -> bool:
    return _number(value) and value <= MODE_MAX  # type: ignore[operator]  # it is a number


def _time(value: object) -> bool:
    return type(value) is int and -NUMBER_MAX <= value <= NUMBER_MAX


def _errno(value: object) -> bool:
    return type(value) is int and 0 <= value <= _ERRNO_MAX


def _name(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _ERRNO_MAX and "\0" not in value


def _list(value: object) -> bool:
    return isinstance(value, list) and len(value) <= ENTRIES_MAX


def _bad(why: str) -> PeerError:
    return PeerError("bad answer of the file server", why)
