"""Messages between the holder of a sandbox (`library/holder`) and its clients (`library/held`).

Each command, and each request, has a connection to the holder's socket of its own. A message is its length in four
bytes, most significant first, and a tagged MessagePack array. Both sides are processes of one user.
"""

from __future__ import annotations

from typing import Any, Final, Generic, NamedTuple, TypeVar

import msgspec
from msgspec.structs import replace

from x07_sandbox import errors
from x07_sandbox.channel.messages import FORMS, Exec, decode
from x07_sandbox.errors import Command, Flag, SandboxError, Text
from x07_sandbox.host.decoding import prepared
from x07_sandbox.host.documents import encodable
from x07_sandbox.host.waiting import Notice
from x07_sandbox.sessions.command import Ended, StreamName
from x07_sandbox.sessions.request import ChangesChoice
from x07_sandbox.sessions.result import Diff, Result

_FRAME_MAX: Final = 1 << 30  # for patches
_HEAD: Final = 4
_MARKS: Final[dict[str, type[str]]] = {"flag": Flag, "command": Command, "": str}

Marked = tuple[str, str]
"""A part of a text: how it is marked, a key of _MARKS, and its words."""


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The base of all messages."""


# requests


class Start(_Message, frozen=True):
    """Start a command, or a service of the agent. order: an `Exec` (channel/messages), encoded. flags: see `Create`.

    For the other fields see `AnySandbox.start`. The holder answers with STARTED, OUTPUT and END. It kills the command
    if the client goes away, unless it is detached.
    """

    order: bytes
    timeout_s: float | None
    term: str
    flags: bool

    def asked(self) -> Exec:
        """Return the command to start. Raises ValueError."""
        order = decode(FORMS[Exec].number, self.order)
        return msgspec.convert([*order], prepared(Exec))


class Attach(_Message, frozen=True):
    """Take over the streams and the end of a detached command. The answers are those to START."""

    id: int
    flags: bool


class Signal(_Message, frozen=True):
    """Send a signal to a command. There is no answer."""

    id: int
    number: int


class Resize(_Message, frozen=True):
    """Change the size of a command's terminal, in the command's connection. There is no answer."""

    id: int
    rows: int
    columns: int


class Extend(_Message, frozen=True):
    """Set the lifetime. The answer is STATUS."""

    lifetime_s: float


class AskStatus(_Message, frozen=True):
    """The answer is STATUS."""


class AskChanges(_Message, frozen=True):
    """The answer is SOFAR."""


class Finish(_Message, frozen=True):
    """Close the sandbox. The answer is FINISHED."""

    changes: ChangesChoice


class Watch(_Message, frozen=True):
    """The answer is FINISHED, once the sandbox has ended."""


Request = Start | Attach | Signal | Resize | Extend | AskStatus | AskChanges | Finish | Watch

# further messages of a client to its command


class Input(_Message, frozen=True):
    """Input of the command."""

    data: bytes


class EndInput(_Message, frozen=True):
    """The end of the input."""


ClientMessage = Request | Input | EndInput

# answers


class Problem(_Message, frozen=True):
    """The request failed. kind: the class of the error, in `errors`. texts: what, why, fix."""

    kind: str
    texts: tuple[list[Marked], ...]
    code: str

    @staticmethod
    def of(exc: SandboxError) -> Problem:
        """Return the message about an error."""
        return Problem(kind=type(exc).__name__, texts=tuple(map(_marked, exc.args)), code=exc.code)

    def error(self) -> SandboxError:
        """Return the error."""
        kind = getattr(errors, self.kind, SandboxError)
        kind = kind if isinstance(kind, type) and issubclass(kind, SandboxError) else SandboxError
        found: SandboxError = kind(*map(_unmarked, self.texts))
        found.code = self.code
        return found


class Started(_Message, frozen=True):
    """The command's number."""

    id: int


class Output(_Message, frozen=True):
    """Output of the command."""

    stream: StreamName
    data: bytes


class End(_Message, frozen=True):
    """How the command ended, without its output."""

    ended: Ended

    @staticmethod
    def of(ended: Ended) -> End:
        """Return the message about an end."""
        return End(replace(ended, reason=encodable(ended.reason)))


class Status(_Message, frozen=True):
    """Facts about an open sandbox. left_s: until its lifetime ends. commands: the number of those that run."""

    left_s: float
    commands: int


class SoFar(_Message, frozen=True):
    """What has changed so far."""

    diff: Diff


class Finished(_Message, frozen=True):
    """The sandbox has ended."""

    result: Result


Answer = Problem | Started | Output | End | Status | SoFar | Finished

# from a new holder to its creator


class Create(NamedTuple):
    """What to open, for a new holder, which gets this pickled. options: keywords of `Sandbox`.

    choice: see `open_sandbox`. flags: whether messages name flags instead of keywords.
    """

    options: dict[str, Any]
    choice: dict[str, Any] | None
    flags: bool


class Progress(_Message, frozen=True):
    """A line of progress. notice: whether it is shown without a terminal, too."""

    text: str
    notice: bool

    @staticmethod
    def of(text: str) -> Progress:
        """Return the message about a line."""
        return Progress(text=str(text), notice=isinstance(text, Notice))

    def line(self) -> str:
        """Return the line."""
        return Notice(self.text) if self.notice else self.text


class Opened(_Message, frozen=True):
    """The sandbox is open."""

    run: str


Opening = Problem | Progress | Opened

_T = TypeVar("_T")


def packed(message: _Message) -> bytes:
    """Return the bytes of a message."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(_HEAD, "big") + body


class Reader(Generic[_T]):
    """Splits the bytes of a connection into messages of one of several types."""

    def __init__(self, types: Any) -> None:  # noqa: ANN401 - a union
        self._data = bytearray()
        self._decoder: msgspec.msgpack.Decoder[_T] = msgspec.msgpack.Decoder(prepared(types))

    def take(self, data: bytes) -> list[_T]:
        """Add bytes, and return the messages that are complete. Raises msgspec.ValidationError, ValueError."""
        self._data += data
        found = []
        while len(self._data) >= _HEAD:
            end = _HEAD + int.from_bytes(self._data[:_HEAD], "big")
            if end > _FRAME_MAX:
                raise ValueError("a message is too long")
            if len(self._data) < end:
                break
            body = bytes(self._data[_HEAD:end])
            del self._data[:end]  # cheap for a bytearray
            found.append(self._decoder.decode(body))
        return found


def _mark(value: object) -> str:
    return next((mark for mark, kind in _MARKS.items() if mark and isinstance(value, kind)), "")


def _marked(text: Text) -> list[Marked]:
    return [(_mark(part), encodable(part)) for part in ((text,) if isinstance(text, str) else text)]


def _unmarked(parts: list[Marked]) -> Text:
    return tuple(_MARKS.get(mark, str)(text) for mark, text in parts)
