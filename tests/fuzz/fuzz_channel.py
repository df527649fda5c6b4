"""Fuzz target: the channel between host and guest.

An input is a byte of switches, the sizes of the pieces in which the stream is read, and the stream itself:

    bit 7        1: we are the guest, and the bytes come from a host; 0: we are the host
    bit 6        1: a stalled reader, who never takes what has arrived
    bits 0 to 3  number of size bytes that follow; a size byte N cuts off N + 1 bytes, and the sizes repeat

Our side answers as a correct host or agent does: the host opens a session with two commands, and closes it after the
first. Invariants:

* only messages, events or PeerError come out, and after a PeerError nothing but PeerError;
* the states change only along NEXT and COMMAND_NEXT;
* buffered input is at most one frame that the peer may send; queued output is at most what we sent ourselves plus
  one credit frame for each quarter of a window;
* the streams and commands that are remembered are limited;
* no stream has more than WINDOW bytes in flight, and nothing arrives on it before its opening or after its end;
* messages, events and errors do not depend on how the stream was cut.
"""

from __future__ import annotations

from typing import Any, Final

from tests.vm.programs.lies import EXITED
from x07_sandbox.channel import streams
from x07_sandbox.channel.link import (
    COMMAND_NEXT,
    COMMANDS_MAX,
    DATA_MAX,
    FILES_MAX,
    NEXT,
    STREAMS,
    WINDOW,
    CommandState,
    Link,
    State,
    Stream,
)
from x07_sandbox.channel.messages import (
    BOUNDS,
    PROTOCOL,
    Changes,
    Close,
    Closed,
    CommandLimits,
    Confine,
    Denied,
    Exec,
    Failed,
    Hello,
    InputFile,
    Message,
    Mount,
    Network,
    Open,
    Output,
    Resize,
    Room,
    Seed,
    Seeded,
    Started,
    Stop,
    Terminal,
    Warm,
    Warmed,
    encode,
)
from x07_sandbox.channel.streams import HEADER, Event, Role
from x07_sandbox.errors import PeerError

NONCE: Final = b"n" * 16
LIMITS: Final = CommandLimits(mem_bytes=1 << 20, tasks=8, cpu_ms=1000, fds=64, core_bytes=-1)
OPEN: Final = Open(
    hostname="x07",
    mem_bytes=1 << 20,
    tasks=8,
    tmp_bytes=1 << 16,
    files=[InputFile("/x07/in/a", 0o644, "file", 3), InputFile("/x07/in/b", 0o755, "tree", 2**40)],
    mounts=[Mount(1, "sub", "/data", write=True, changes=True), Mount(None, "", "/opt/x07", write=True, changes=False)],
    confine=Confine(threads=True, spawn=True, execute=False, programs=["/bin/true"], prefixes=["/usr/"], alone=True),
    network=Network({"a.example": "127.64.0.1"}, [[".b.example", "127.65.0.0"]], [["127.64.0.1", "", [443]]], []),
    out_writable=True,
    room=Room(1, 2),
)
DENIED: Final = Denied(id=1, by="kernel", call="openat", errno=13, path="/root/x", write=False, times=1)
# One message of each type; those with an id are about command 1.
MESSAGES: Final[dict[type[Any], Message]] = {
    type(message): message
    for message in (
        Hello(PROTOCOL),
        Warm(["json"], LIMITS, 1 << 16, "x07", out_writable=True, network=False, commands=[["/bin/true"]]),
        Warmed(),
        Seed(1, b"e" * 64, NONCE, b"m" * 16),
        Seeded(NONCE),
        OPEN,
        Exec(1, ["true", "\udcff"], {"A": "\udc80"}, "/", LIMITS, "files", merge=True, terminal=Terminal(24, 80)),
        Started(1),
        Stop(1, 9),
        Resize(1, 25, 81),
        Changes(),
        DENIED,
        EXITED,
        Close(1, Output("/x07/out/a", 9), None),
        Closed(3, None, 0, 0),
        Failed(0, "init", 2, "no"),
    )
}
OUR_BYTES: Final = bytes(WINDOW + 1)  # more than a window, so that all of it is in flight and the peer may send credit
HELD_MAX: Final = {
    role: HEADER.size + max(DATA_MAX, *(bounds.most for bounds in BOUNDS.values() if bounds.sender is not role))
    for role in Role
}
CREDIT_FRAME: Final = HEADER.size + 4
STREAMS_MAX: Final = sum(kind.at_once for kind in STREAMS.streams.values())
USED_MAX: Final = FILES_MAX + 3 * COMMANDS_MAX + 4


def frame(kind: int, stream: int, payload: bytes = b"", code: int = 0, zero: int = 0) -> bytes:
    """Return a frame, valid or not."""
    return HEADER.pack(kind, code, zero, stream, len(payload)) + payload


def message(value: Message) -> bytes:
    """Return the frame of a message."""
    number, payload = encode(value)
    return frame(streams.MESSAGE, 0, payload, number)


def opening(number: int, stream: Stream, subject: int = 0) -> bytes:
    """Return the frame that opens a stream."""
    return frame(streams.OPEN, number, subject.to_bytes(4, "big"), stream)


class Side:
    """One end of the channel: answers correctly, and checks the invariants after each event."""

    def __init__(self, role: Role, *, stalled: bool) -> None:
        self.link = Link(role)
        self.stalled = stalled
        self.state = State.WAITING
        self.events: list[tuple[type[Any], Message | Event]] = []  # with types: tuples of two types may be equal
        self.error: PeerError | None = None
        self.commands: dict[int, CommandState] = {}
        self.on_the_way: dict[int, int] = {}
        self.data_bytes = 0
        self.allowed = 0  # bytes that may be queued
        self.close: Close | None = None
        self.stdout: dict[int, int] = {}  # streams, by command
        if role is Role.GUEST:
            self._send(Hello(PROTOCOL))

    def feed(self, piece: bytes) -> None:
        """Feed a piece of the stream."""
        try:
            for event in self.link.receive(piece):
                self._take(event)
        except PeerError as exc:
            self.error = self.error or exc
        else:
            assert self.error is None, "the link came back to life"
        held = len(self.link.streams._in)  # noqa: SLF001 - the bound on it is the promise
        assert held <= (0 if self.error else HELD_MAX[self.link.role]), f"{held} bytes are held"
        assert self.error or self.link.state is self.state
        assert self.link.pending() <= self.allowed + CREDIT_FRAME * (self.data_bytes // (WINDOW // 4))
        check_remembered(self.link)

    def _take(self, event: Message | Event) -> None:
        assert self.error is None, "an event after the fault"
        self.events.append((type(event), event))
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
            self._take_data(number, event.data)
        elif event.type in {streams.FIN, streams.RESET}:
            assert not self.link.streams.is_open(number)
            self.on_the_way.pop(number, None)
        else:
            assert event.type == streams.CREDIT
            assert 0 < self.link.streams.window(number) <= WINDOW

    def _take_data(self, number: int, data: bytes) -> None:
        assert 0 < len(data) <= DATA_MAX
        self.on_the_way[number] += len(data)
        assert self.on_the_way[number] <= WINDOW
        self.data_bytes += len(data)
        if not self.stalled:
            before = self.link.pending()
            self.link.streams.consumed(number, len(data))
            if self.link.pending() > before:  # only now may the peer send as much again
                self.on_the_way[number] = 0

    def _answer(self, value: Message) -> None:
        if isinstance(value, Hello):
            self._send(MESSAGES[Seed])
        elif isinstance(value, Seeded):
            self._open_session()
        elif isinstance(value, Started) and self.link.role is Role.HOST and value.id == 1:
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
            self._send_changes()
        elif isinstance(value, Close):
            self.close = value
            self._close_after(0)

    def _send_changes(self) -> None:
        number = self._open(Stream.CHANGES, 0)
        self.link.streams.finish(number)
        self.allowed += HEADER.size

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
        self.link.streams.finish(self.stdout[command])
        self.allowed += HEADER.size
        self._send(EXITED._replace(id=command))
        self._close_after(command)

    def _close_after(self, command: int) -> None:
        if self.state is State.CLOSING and self.close is not None and self.close.after == command:
            number = self._open(Stream.OUTPUT, 0)
            self.link.streams.finish(number)
            self.allowed += HEADER.size
            self._send(Closed(WINDOW, None, 0, 0))

    def _open(self, stream: Stream, subject: int) -> int:
        """Open a stream, and send a window's worth of data."""
        before = self.link.pending()
        number = self.link.open(stream, subject)
        assert self.link.streams.send(number, OUR_BYTES) == WINDOW
        self.allowed += self.link.pending() - before
        return number

    def _send(self, value: Message) -> None:
        before = self.link.pending()
        self.link.send(value)
        self._change_state(value)
        self.allowed += self.link.pending() - before


def check_remembered(link: Link) -> None:
    """Check that a link remembers a limited number of streams and commands."""
    assert len(link.streams._open) <= STREAMS_MAX  # noqa: SLF001 - the bounds are the promise
    assert len(link._subjects) <= STREAMS_MAX  # noqa: SLF001
    assert len(link._commands) <= COMMANDS_MAX  # noqa: SLF001
    assert len(link._used) <= USED_MAX  # noqa: SLF001


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


def play(role: Role, parts: list[bytes], *, stalled: bool) -> Side:
    """Return a side that was fed these pieces and then two empty ones."""
    side = Side(role, stalled=stalled)
    for part in [*parts, b"", b""]:
        side.feed(part)
    return side


def same_error(one: PeerError | None, other: PeerError | None) -> bool:
    """Return whether both are the same fault, or both None."""
    return (one and one.args) == (other and other.args)


def one_input(data: bytes) -> None:
    """Check one input. Raises AssertionError, or any exception that the code under test must not raise."""
    if not data:
        return
    role = Role.GUEST if data[0] & 0x80 else Role.HOST
    stalled = bool(data[0] & 0x40)
    count = data[0] & 0x0F
    stream = data[1 + count :]
    cut = play(role, pieces(stream, data[1 : 1 + count]), stalled=stalled)
    whole = play(role, [stream], stalled=stalled)
    assert cut.events == whole.events
    assert same_error(cut.error, whole.error)
