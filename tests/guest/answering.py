"""Ends of a stream of frames that answer correctly by themselves, and check what must hold after each event."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from tests.guest.lies import EXITED
from tests.guest.messages import GUEST, HELD_MAX, HOST, MESSAGES, OPEN, check_remembered
from x07_sandbox.channel import streams
from x07_sandbox.channel.link import COMMAND_NEXT, DATA_MAX, NEXT, WINDOW, CommandState, Link, State, Stream
from x07_sandbox.channel.messages import (
    PROTOCOL,
    Changes,
    Close,
    Closed,
    Exec,
    Failed,
    Hello,
    Message,
    Seed,
    Seeded,
    Started,
    Stop,
    Warm,
    Warmed,
)
from x07_sandbox.channel.streams import HEADER, Event, Role
from x07_sandbox.errors import PeerError

if TYPE_CHECKING:
    from collections.abc import Callable

OUR_BYTES: Final = bytes(WINDOW + 1)  # more than a window, so that all of it is in flight and the peer may send credit
CREDIT_FRAME: Final = HEADER.size + 4


class Side:
    """One end. Subclasses answer in `take`, and add to `allowed` what they queue."""

    def __init__(self, link: Link | streams.Streams, held_max: int, window: int, *, stalled: bool) -> None:
        self.receive = link.receive
        self.streams = link.streams if isinstance(link, Link) else link
        self.held_max = held_max
        self.window = window
        self.stalled = stalled
        self.events: list[tuple[type[Any], Message | Event]] = []  # with types: tuples of two types may be equal
        self.error: PeerError | None = None
        self.on_the_way: dict[int, int] = {}
        self.data_bytes = 0
        self.allowed = 0  # bytes that may be queued

    def take(self, event: Message | Event) -> None:
        """Check a message or an event, and answer it."""
        raise NotImplementedError

    def check(self) -> None:
        """Check this end after a piece of the stream."""

    def feed(self, piece: bytes) -> None:
        """Feed a piece of the stream."""
        try:
            for event in self.receive(piece):
                assert self.error is None, "an event after the fault"
                self.events.append((type(event), event))
                self.take(event)
        except PeerError as exc:
            self.error = self.error or exc
        else:
            assert self.error is None, "the link came back to life"
        held = len(self.streams._in)  # noqa: SLF001 - the bound on it is the promise
        assert held <= (0 if self.error else self.held_max), f"{held} bytes are held"
        assert self.streams.pending() <= self.allowed + CREDIT_FRAME * (self.data_bytes // (self.window // 4))
        self.check()

    def take_data(self, number: int, data: bytes) -> None:
        """Check data of a stream, and consume it unless this end is stalled."""
        assert data
        self.on_the_way[number] = self.on_the_way.get(number, 0) + len(data)
        assert self.on_the_way[number] <= self.window
        self.data_bytes += len(data)
        if not self.stalled:
            before = self.streams.pending()
            self.streams.consumed(number, len(data))
            if self.streams.pending() > before:  # only now may the peer send as much again
                self.on_the_way[number] = 0


class Conversing(Side):
    """A correct host or agent: the host opens a session with two commands, and closes it after the first."""

    def __init__(self, role: Role, *, stalled: bool) -> None:
        self.link = Link(role)
        super().__init__(self.link, HELD_MAX[role], WINDOW, stalled=stalled)
        self.state = State.WAITING
        self.commands: dict[int, CommandState] = {}
        self.close: Close | None = None
        self.stdout: dict[int, int] = {}  # streams, by command
        if role is GUEST:
            self._send(Hello(PROTOCOL))

    def check(self) -> None:
        """Check the state and the bounds of the link."""
        assert self.error or self.link.state is self.state
        check_remembered(self.link)

    def take(self, event: Message | Event) -> None:
        """Check a message or an event, and answer it."""
        if isinstance(event, Event):
            self._take_event(event)
        else:
            self._change_state(event)
            self._answer(event)
        assert self.link.state is self.state

    def _change_state(self, value: Message) -> None:
        about = getattr(value, "id", 0)
        if isinstance(value, Exec):
            self.commands[about] = CommandState.STARTING
        elif about:
            self.commands[about] = COMMAND_NEXT[self._state_of(about), type(value)]
        if not (isinstance(value, Failed) and about):
            self.state = NEXT[self.state, type(value)]
        if isinstance(value, Warm):
            self.commands.clear()
            self.on_the_way.clear()

    def _state_of(self, command: int) -> CommandState:
        """Return the state of a command. An id that was skipped counts as ended, since neither end remembers it."""
        if command not in self.commands:
            assert command < max(self.commands)
        return self.commands.get(command, CommandState.ENDED)

    def _take_event(self, event: Event) -> None:
        number = event.stream
        if event.type == streams.OPEN:
            assert number not in self.on_the_way
            self.on_the_way[number] = 0
            if event.code == Stream.STDIN and self._state_of(self.link.subject(number)) is CommandState.ENDED:
                self.link.streams.reset(number)
                self.allowed += HEADER.size
        elif event.type == streams.DATA:
            assert number in self.on_the_way
            assert len(event.data) <= DATA_MAX
            self.take_data(number, event.data)
        elif event.type in {streams.FIN, streams.RESET}:
            assert not self.link.streams.is_open(number)
            self.on_the_way.pop(number, None)
        else:
            assert event.type == streams.CREDIT
            assert 0 < self.link.streams.window(number) <= WINDOW

    def _answer(self, value: Message) -> None:
        if isinstance(value, Hello):
            self._send(MESSAGES[Seed])
        elif isinstance(value, Seeded):
            self._open_session()
        elif isinstance(value, Started) and self.link.role is HOST and value.id == 1:
            self._send(Stop(1, 9))
        elif isinstance(value, Warm):
            self._send(Warmed())
        elif isinstance(value, Seed):
            self._send(Seeded(value.nonce))
        elif isinstance(value, Exec):
            self._send(Started(value.id))
            self.stdout[value.id] = self._open(Stream.STDOUT, value.id)
        elif isinstance(value, Stop) and self.commands[value.id] is CommandState.RUNNING:
            self._end_command(value.id)
        elif isinstance(value, Changes):
            self._finish(self._open(Stream.CHANGES, 0))
        elif isinstance(value, Close):
            self.close = value
            self._close_after(0)

    def _open_session(self) -> None:
        self._send(OPEN)
        self._open(Stream.INPUT, 1)
        for number in (1, 2):
            self._send(MESSAGES[Exec]._replace(id=number))  # type: ignore[call-arg]
            self._open(Stream.STDIN, number)
        self._send(MESSAGES[Close])

    def _end_command(self, command: int) -> None:
        if self.state is State.CLOSED:  # a session that closes after no command leaves it running
            return
        self._finish(self.stdout[command])
        self._send(EXITED._replace(id=command))
        self._close_after(command)

    def _close_after(self, command: int) -> None:
        if self.state is State.CLOSING and self.close is not None and self.close.after == command:
            self._finish(self._open(Stream.OUTPUT, 0))
            self._send(Closed(WINDOW, None, 0, 0))

    def _open(self, stream: Stream, subject: int) -> int:
        """Open a stream, and send a window's worth of data."""
        before = self.link.pending()
        number = self.link.open(stream, subject)
        assert self.link.streams.send(number, OUR_BYTES) == WINDOW
        self.allowed += self.link.pending() - before
        return number

    def _finish(self, number: int) -> None:
        self.link.streams.finish(number)
        self.allowed += HEADER.size

    def _send(self, value: Message) -> None:
        before = self.link.pending()
        self.link.send(value)
        self._change_state(value)
        self.allowed += self.link.pending() - before


def pieces(stream: bytes, sizes: bytes) -> list[bytes]:
    """Return the stream in pieces; in one piece if there are no sizes."""
    if not sizes:
        return [stream]
    cut: list[bytes] = []
    at = 0
    while at < len(stream):
        size = sizes[len(cut) % len(sizes)] + 1
        cut.append(stream[at : at + size])
        at += size
    return cut


def check_any_cut(data: bytes, make: Callable[[Role, bool], Side]) -> None:
    """Check one input of a fuzzer, whole and in pieces. Raises AssertionError, or what the code must not raise.

    An input is a byte of switches, the sizes of the pieces in which the stream is read, and the stream itself:

        bit 7        1: we are the guest, and the bytes come from a host; 0: we are the host
        bit 6        1: a stalled reader, who never takes what has arrived
        bits 0 to 3  number of size bytes that follow; a size byte N cuts off N + 1 bytes, and the sizes repeat

    make: makes an end with a role that may be stalled.
    """
    if not data:
        return
    role, stalled, count = GUEST if data[0] & 0x80 else HOST, bool(data[0] & 0x40), data[0] & 0x0F
    stream = data[1 + count :]
    played = []
    for parts in (pieces(stream, data[1 : 1 + count]), [stream]):
        side = make(role, stalled)
        for part in [*parts, b"", b""]:
            side.feed(part)
        played.append((side.events, side.error and side.error.args))
    assert played[0] == played[1]
