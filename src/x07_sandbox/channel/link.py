"""The conversation between host and guest agent, as a state machine without I/O that both share.

`NEXT` gives the state of the session after each message, and `COMMAND_NEXT` the state of the command that a message
names. `STREAMS` lists the streams. Anything else raises PeerError (the peer's fault) or ChannelUsageError (this side's
fault).
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from x07_sandbox.channel import messages, streams
from x07_sandbox.channel.messages import (
    BOUNDS,
    FORMS,
    ID_MAX,
    Changes,
    Close,
    Closed,
    Denied,
    Exec,
    Exited,
    Failed,
    Held,
    Hello,
    Hold,
    Message,
    Open,
    Resize,
    Resume,
    Seed,
    Seeded,
    Started,
    Stop,
    Warm,
    Warmed,
)
from x07_sandbox.channel.streams import Event, Kind, Role, Streams, Table
from x07_sandbox.errors import ChannelUsageError, PeerError

DATA_MAX: Final = 128 * 1024  # emulated guests move 42 MiB/s so, and 15 MiB/s in frames of 32 KiB
WINDOW: Final = 1024 * 1024
COMMANDS_MAX: Final = 64  # at the same time
FILES_MAX: Final = 256  # of OPEN
_SUBJECT: Final = struct.Struct(">I")


class Stream(enum.IntEnum):
    """The kinds of streams. Each OPEN frame has a subject (u32): a command's id, the number of an input file, or 0."""

    INPUT = 1
    STDIN = 2
    STDOUT = 3
    STDERR = 4
    OUTPUT = 5
    CHANGES = 6
    LEFT = 7
    RELAY = 8


_OF_COMMANDS: Final = frozenset({Stream.STDIN, Stream.STDOUT, Stream.STDERR})


def _kind(sender: Role, at_once: int) -> Kind:
    return Kind(sender, sender, _SUBJECT.size, _SUBJECT.size, at_once)


STREAMS: Final = Table(
    BOUNDS,
    {
        Stream.INPUT: _kind(Role.HOST, FILES_MAX),
        Stream.STDIN: _kind(Role.HOST, COMMANDS_MAX),
        Stream.STDOUT: _kind(Role.GUEST, COMMANDS_MAX),
        Stream.STDERR: _kind(Role.GUEST, COMMANDS_MAX),
        Stream.OUTPUT: _kind(Role.GUEST, 1),
        Stream.CHANGES: _kind(Role.GUEST, 1),
        Stream.LEFT: _kind(Role.GUEST, 1),
        Stream.RELAY: Kind(Role.GUEST, None, _SUBJECT.size, _SUBJECT.size, 1),
    },
    DATA_MAX,
    WINDOW,
)


class State(enum.Enum):
    """The state of the session."""

    WAITING = "waiting"  # for HELLO
    GREETED = "greeted"
    WARMING = "warming"
    WARM = "warm"  # the VM is saved here, and every clone starts here
    SEEDING = "seeding"
    READY = "ready"
    OPEN = "open"
    HOLDING = "holding"
    HELD = "held"  # neither side has sent anything that has not arrived: the VM can be saved, and its copies start here
    RESEEDING = "reseeding"
    # commands may still run; the guest sends what CLOSE asks for once the command *after* has ended
    CLOSING = "closing"
    CLOSED = "closed"
    FAILED = "failed"


_HELD: Final = (State.HOLDING, State.HELD, State.RESEEDING)
_AFTER_OPEN: Final = (State.OPEN, *_HELD, State.CLOSING, State.CLOSED, State.FAILED)
_REPORTING: Final = (State.OPEN, State.HOLDING, State.CLOSING)
_CAN_FAIL: Final = (State.WARMING, State.SEEDING, State.RESEEDING, *_REPORTING)
NEXT: Final[dict[tuple[State, type[Any]], State]] = {
    (State.WAITING, Hello): State.GREETED,
    (State.GREETED, Seed): State.SEEDING,
    (State.GREETED, Warm): State.WARMING,
    (State.WARMING, Warmed): State.WARM,
    (State.WARM, Seed): State.SEEDING,
    (State.SEEDING, Seeded): State.READY,
    (State.READY, Open): State.OPEN,
    (State.OPEN, Exec): State.OPEN,
    (State.OPEN, Changes): State.OPEN,
    (State.OPEN, Hold): State.HOLDING,
    (State.HOLDING, Held): State.HELD,
    (State.HELD, Resume): State.OPEN,
    (State.HELD, Seed): State.RESEEDING,
    (State.RESEEDING, Seeded): State.HELD,
    # The host waits no longer, and HELD comes late.
    (State.HOLDING, Resume): State.OPEN,
    **{(state, Held): state for state in (State.OPEN, State.CLOSING)},
    (State.OPEN, Close): State.CLOSING,
    (State.CLOSING, Closed): State.CLOSED,
    # The host has run a warm-up program of its own.
    (State.CLOSED, Warm): State.WARMING,
    **{(state, kind): state for state in _REPORTING for kind in (Started, Denied, Exited)},
    # They may cross the message that reports the end.
    **{(state, kind): state for state in _AFTER_OPEN for kind in (Stop, Resize)},
    **{(state, Failed): State.FAILED for state in _CAN_FAIL},
}


class CommandState(enum.Enum):
    """The state of a command."""

    STARTING = "starting"
    RUNNING = "running"
    ENDED = "ended"


COMMAND_NEXT: Final[dict[tuple[CommandState, type[Any]], CommandState]] = {
    (CommandState.STARTING, Started): CommandState.RUNNING,
    (CommandState.STARTING, Failed): CommandState.ENDED,
    (CommandState.RUNNING, Denied): CommandState.RUNNING,
    (CommandState.RUNNING, Exited): CommandState.ENDED,
    **{(state, kind): state for state in CommandState for kind in (Stop, Resize)},
}


class LinkState(NamedTuple):
    """The state of a session whose programs are held: its commands that have not ended, and numbers of messages."""

    commands: dict[int, CommandState]
    last_command: int
    holds: int


class Link:
    """One end of the channel; not thread-safe. If the VM is a clone of a saved VM, *state* is WARM at first.

    streams: the streams of both sides. `open` opens a stream of this side.
    """

    def __init__(self, role: Role, state: State = State.WAITING) -> None:
        self.role = role
        self.peer = Role.GUEST if role is Role.HOST else Role.HOST
        self.state = state
        self.streams = Streams(role, STREAMS)
        self._commands: dict[int, CommandState] = {}  # without those that have ended
        self.last_command = 0
        self._subjects: dict[int, tuple[Stream, int]] = {}  # of open streams, by number
        self._used: set[tuple[Stream, int]] = set()  # streams that were opened, and cannot be opened again
        self._changes = 0  # number of CHANGES messages whose stream was not opened yet
        self._held = 0  # number of the last HELD
        self.holds = 0  # number of the last HOLD
        self.stopped = False  # whether the last HELD says that all programs have stopped

    def receive(self, data: bytes | memoryview) -> Iterator[Message | Event]:
        """Take bytes from the peer, and yield messages and events of streams.

        Raises PeerError, and again on every later call.
        """
        return self._events(self.streams.receive(data))

    def _events(self, events: Iterator[Event]) -> Iterator[Message | Event]:
        try:
            for event in events:
                yield self._message(event) if event.type == streams.MESSAGE else self._stream_event(event)
                if event.stream and not self.streams.is_open(event.stream):
                    self._subjects.pop(event.stream, None)
        except PeerError:
            self.streams.fail()
            raise

    def _message(self, event: Event) -> Message:
        message = messages.decode(event.code, event.data)
        if problem := self._advance(message):
            raise PeerError("message out of order", problem)
        return message

    def _stream_event(self, event: Event) -> Event:
        if event.type == streams.OPEN:
            stream, subject = Stream(event.code), _SUBJECT.unpack(event.data)[0]
            if problem := self._problem(stream, subject):
                raise PeerError("bad frame", problem)
            self._add(event.stream, stream, subject)
        return event

    def subject(self, number: int) -> int:
        """Return the subject of an open stream, or of one whose end was just received."""
        return self._subjects[number][1]

    def send(self, message: Message) -> None:
        """Queue a message. Raises ChannelUsageError if this side may not send it now, or if a value does not fit."""
        if FORMS[type(message)].sender is not self.role:
            raise ChannelUsageError(f"the {self.role.value} cannot send {_name(message)}")
        encoded = messages.encode(message)
        if problem := self._advance(message):
            raise ChannelUsageError(problem)
        self.streams.message(*encoded)

    def open(self, stream: Stream, subject: int = 0) -> int:
        """Open a stream, and return its number. Raises ChannelUsageError."""
        if problem := self._problem(stream, subject):
            raise ChannelUsageError(problem)
        number = self.streams.open(stream, _SUBJECT.pack(subject))
        self._add(number, stream, subject)
        return number

    def pending(self) -> int:
        """Number of queued bytes."""
        return self.streams.pending()

    def _problem(self, stream: Stream, subject: int) -> str:
        """Return why a stream may not be opened now, or ""."""
        if stream is Stream.INPUT:
            allowed = self.state in _AFTER_OPEN and 0 <= subject < FILES_MAX
        elif stream is Stream.STDIN:
            # When the guest receives it, the command may have ended.
            ended = self.role is Role.GUEST and 0 < subject <= self.last_command
            allowed = subject in self._commands or ended
        elif stream in {Stream.STDOUT, Stream.STDERR}:
            allowed = self._commands.get(subject) is CommandState.RUNNING
        elif stream is Stream.RELAY:
            allowed = self.state in {State.OPEN, State.CLOSING} and not subject
        elif stream is Stream.CHANGES and self._changes and not subject:
            return ""
        else:
            allowed = self.state is State.CLOSING and not subject
        if allowed and (stream, subject) not in self._used:
            return ""
        return f"{stream.name} {subject} cannot be opened while {self.state.value}"

    def _add(self, number: int, stream: Stream, subject: int) -> None:
        self._subjects[number] = stream, subject
        if stream is Stream.CHANGES and self._changes:
            self._changes -= 1
            # Streams of this side end without an event, so their subjects are removed here.
            self._subjects = {open_: of for open_, of in self._subjects.items() if self.streams.is_open(open_)}
        elif stream not in _OF_COMMANDS or subject in self._commands:
            self._used.add((stream, subject))

    def _advance(self, message: Message) -> str:
        """Change the states as *message* demands. Return why it is out of order, or ""."""
        problem = f"{_name(message)} while {self.state.value}"
        following = NEXT.get((self.state, type(message)))
        if following is None:
            return problem
        number: int = getattr(message, "id", -1)
        if isinstance(message, Exec):
            if not self.last_command < number <= ID_MAX or len(self._commands) >= COMMANDS_MAX:
                return f"command {number} cannot be added"
            self.last_command = number
            self._commands[number] = CommandState.STARTING
        elif (
            number >= 0
            and (number or not isinstance(message, Failed))
            and (problem := self._advance_command(number, type(message)))
        ):
            return problem
        if isinstance(message, Failed) and number:
            return ""
        if isinstance(message, Hold | Held):
            return self._hold(message, following)
        self.state = following
        if isinstance(message, Changes):
            self._changes += 1
        if isinstance(message, Warm):
            self._restart()
        if following is State.RESEEDING:
            self._begin_streams()
        return ""

    def _hold(self, message: Hold | Held, following: State) -> str:
        """Count HOLD, or its answer, which is late if the host has sent another HOLD since."""
        if isinstance(message, Hold):
            if message.number != self.holds + 1:
                return f"HOLD {message.number} after {self.holds}"
            self.holds = message.number
        elif not self._held < message.number <= self.holds:
            return f"HELD {message.number} after {self._held} of {self.holds}"
        else:
            self._held, self.stopped = message.number, message.stopped
        if isinstance(message, Hold) or message.number == self.holds:
            self.state = following
        return ""

    def _advance_command(self, number: int, message: type[Any]) -> str:
        # A command that has ended may still be stopped, since the messages may cross.
        ended = CommandState.ENDED if 0 < number <= self.last_command else None
        before = self._commands.get(number, ended)
        after = None if before is None else COMMAND_NEXT.get((before, message))
        if after is None:
            return f"{message.__name__.upper()} for command {number}"
        if after is CommandState.ENDED:
            return self._end(number)
        self._commands[number] = after
        return ""

    def held(self) -> LinkState:
        """Return what the host's end of the channel to a copy of the VM must know. The programs are held."""
        return LinkState(dict(self._commands), self.last_command, self.holds)

    @staticmethod
    def resumed(state: LinkState) -> Link:
        """Return the host's end of the channel to a copy of a VM. Its streams begin anew, at both ends."""
        link = Link(Role.HOST, State.HELD)
        link._commands, link.last_command = dict(state.commands), state.last_command
        link.holds = link._held = state.holds
        return link

    def _restart(self) -> None:
        """Forget the warm-up program's streams and commands."""
        self._begin_streams()
        self._commands.clear()
        self.last_command = 0

    def _begin_streams(self) -> None:
        self.streams.restart()
        self._subjects.clear()
        self._used.clear()
        self._changes = 0

    def _end(self, command: int) -> str:
        """Forget a command and its input. Return a problem if its output has not ended."""
        own = {(stream, command) for stream in _OF_COMMANDS}
        numbers = [number for number, of in self._subjects.items() if of in own]
        if any(self._subjects[number][0] is not Stream.STDIN and self.streams.is_open(number) for number in numbers):
            return f"the end of command {command} before the end of its output"
        for number in numbers:
            self.streams.forget(number)
            del self._subjects[number]
        self._commands.pop(command, None)
        self._used -= own
        return ""


def _name(message: Message) -> str:
    return type(message).__name__.upper()
