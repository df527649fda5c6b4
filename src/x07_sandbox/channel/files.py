"""Requests about files in a sandbox, and their answers, over the standard streams of the file server in the guest.

A request or an answer is its length (u32, big endian) and a JSON array. After WRITE come its bytes, and after PUT a
tree (channel/trees). After a successful answer to READ come the bytes, or the segments of a file in a tree, and after
one to GET a tree. Requests are answered in order. The server runs as the program's user in the program's namespaces,
so a request reaches what a program reaches. The guest is hostile: answers are bounded here.
"""

from __future__ import annotations

import json
import struct
from typing import Any, Final, NamedTuple

from x07_sandbox.channel.messages import COUNT_MAX, Shape
from x07_sandbox.errors import PeerError

MESSAGE_MAX: Final = 8 << 20
ENTRIES_MAX: Final = 100_000
_LENGTH: Final = struct.Struct(">I")

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


_NAME: Final = Shape(str, 4096)  # with lone surrogates, and without NUL
_NUMBER: Final = Shape(int)
_ANSWER: Final = (Shape(int, 4096), _NUMBER, Shape(list, ENTRIES_MAX))
_INFO: Final = (_NAME, Shape(int, 0o177777), _NUMBER, Shape(int, lo=-COUNT_MAX), _NAME)


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
    number, size, entries = _checked(values, _ANSWER, "answer")
    return Answer(number, size, tuple(FileInfo(*_checked(one, _INFO, "entry")) for one in entries))


def _checked(values: Any, shapes: tuple[Shape, ...], what: str) -> list[Any]:  # noqa: ANN401
    if not isinstance(values, list) or len(values) != len(shapes):
        raise _bad(f"an {what} has the wrong number of fields")
    for value, shape in zip(values, shapes, strict=True):
        if (problem := shape.problem(value)) or (shape is _NAME and "\0" in value):
            raise _bad(f"a field of an {what} {problem or 'contains a NUL'}")
    return values


def _bad(why: str) -> PeerError:
    return PeerError("bad answer of the file server", why)
