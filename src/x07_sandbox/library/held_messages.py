"""Messages between the holder of a sandbox (`library/holder`) and its clients (`library/held`).

Each command, and each request, has a connection to the holder's socket of its own.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, NamedTuple

import msgspec
from msgspec.structs import replace

from x07_sandbox.channel.messages import FORMS, Exec, decode
from x07_sandbox.errors import UsageError
from x07_sandbox.host.documents import encodable, prepared
from x07_sandbox.host.sockets import Message
from x07_sandbox.library.resident import Problem
from x07_sandbox.sessions.command import Ended, StreamName
from x07_sandbox.sessions.result import ChangesChoice, Result

# requests


class Start(Message, frozen=True):
    """Start a command, or a service of the agent. order: an `Exec` (channel/messages), encoded. flags: see `Create`.

    For the other fields see `AnySandbox.start`. The holder answers with STARTED, OUTPUT and END. It kills the command
    if the client goes away, unless it is detached.
    """

    order: bytes
    timeout_s: float | None
    term: str
    flags: bool

    def asked(self) -> Exec:
        """Return the command to start. Raises UsageError, PeerError."""
        order = decode(FORMS[Exec].number, self.order)
        try:
            return msgspec.convert(msgspec.to_builtins(order), prepared(Exec))
        except msgspec.ValidationError as exc:
            raise UsageError("cannot run the command", f"its arguments are malformed ({exc})", "Pass strings") from exc


class Attach(Message, frozen=True):
    """Take over the streams and the end of a detached command. The answers are those to START."""

    id: int
    flags: bool


class Signal(Message, frozen=True):
    """Send a signal to a command. There is no answer."""

    id: int
    number: int


class Call(Message, frozen=True):
    """Carry out a method of CALLS about the whole sandbox. given: its arguments. The answer is RETURNED."""

    name: str
    given: tuple[Any, ...]

    def arguments(self) -> tuple[Any, ...]:
        """Return the arguments, checked. Raises ValueError, msgspec.ValidationError."""
        if self.name not in CALLS:
            raise ValueError("no such method")
        found: tuple[Any, ...] = msgspec.convert(self.given, prepared(CALLS[self.name]))
        return found


class Watch(Message, frozen=True):
    """The answer is FINISHED, once the sandbox has ended."""


Request = Start | Attach | Signal | Call | Watch

# further messages of a client to its command


class Input(Message, frozen=True):
    """Input of the command."""

    data: bytes


class EndInput(Message, frozen=True):
    """The end of the input."""


class Resize(Message, frozen=True):
    """Change the size of the command's terminal."""

    rows: int
    columns: int


ClientMessage = Request | Input | EndInput | Resize

# answers


class Started(Message, frozen=True):
    """The command's number."""

    id: int


class Output(Message, frozen=True):
    """Output of the command."""

    stream: StreamName
    data: bytes


class End(Message, frozen=True):
    """How the command ended, without its output."""

    ended: Ended

    @staticmethod
    def of(ended: Ended) -> End:
        """Return the message about an end."""
        return End(replace(ended, reason=encodable(ended.reason)))


class Returned(Message, frozen=True):
    """What a method has returned."""

    value: Any


class Finished(Message, frozen=True):
    """The sandbox has ended."""

    result: Result


Answer = Problem | Started | Output | End | Returned | Finished


class Status(msgspec.Struct, frozen=True):
    """Facts about an open sandbox. left_s: until its lifetime ends. commands: the number of those that run."""

    left_s: float
    commands: int


CALLS: Final[dict[str, Any]] = {
    "extend": tuple[Annotated[float, msgspec.Meta(gt=0)]],
    "status": tuple[()],
    "changes": tuple[()],
    "fork": tuple[int, dict[str, Any], bool],
    "snapshot": tuple[str],
    "checkpoint": tuple[()],
    "rollback": tuple[int],
    "pause": tuple[()],
    "finish": tuple[ChangesChoice],
}
"""The types of the arguments of each method of CALL. All but "status" and "fork" are those of `AnySandbox`."""


class Create(NamedTuple):
    """What to open, for a new holder, which gets this pickled. options: keywords of `Sandbox`.

    choice: see `open_sandbox`. flags: whether messages name flags instead of keywords.
    """

    options: dict[str, Any]
    choice: dict[str, Any] | None
    flags: bool
