"""Sample messages and frames of the channel, and links that have reached any state."""

from __future__ import annotations

import itertools
from typing import Any, Final

from tests.guest.lies import CLOSED, DENIED, EXITED
from x07_sandbox.channel import streams
from x07_sandbox.channel.link import COMMANDS_MAX, DATA_MAX, FILES_MAX, STREAMS, CommandState, Link, State, Stream
from x07_sandbox.channel.messages import (
    BOUNDS,
    FORMS,
    PROTOCOL,
    Changes,
    Close,
    Closed,
    CommandLimits,
    Confine,
    Exec,
    Failed,
    Held,
    Hello,
    Hold,
    InputFile,
    Message,
    Mount,
    Network,
    Open,
    Output,
    Resize,
    Resume,
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

HOST, GUEST = Role.HOST, Role.GUEST
OTHER: Final = {HOST: GUEST, GUEST: HOST}
NONCE: Final = b"n" * 16
LIMITS: Final = CommandLimits(mem_bytes=1 << 20, tasks=8, cpu_ms=1000, fds=64, core_bytes=-1)
FREE: Final = Confine(threads=True, spawn=True, execute=True, programs=None, prefixes=[], alone=True)
PLAIN: Final = Open("x07", 1 << 20, 8, 1 << 20, [], [], FREE, None, out_writable=False, room=Room(0, 0))
"""A session without files, mounts and a network."""
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
        Hold(1),
        Held(1, stopped=True),
        Resume(),
        DENIED,
        EXITED,
        Close(1, Output("/x07/out/a", 9), None),
        Closed(3, None, 0, 0),
        Failed(0, "init", 2, "no"),
    )
}
CLOSE_NOW: Final = Close(0, None, None)
OPENER: Final = {kind: HOST if kind in {Stream.INPUT, Stream.STDIN} else GUEST for kind in Stream}
STREAMS_MAX: Final = sum(kind.at_once for kind in STREAMS.streams.values())
USED_MAX: Final = FILES_MAX + 3 * COMMANDS_MAX + 4
HELD_MAX: Final = {
    role: HEADER.size + max(DATA_MAX, *(bounds.most for bounds in BOUNDS.values() if bounds.sender is not role))
    for role in Role
}
# How a session gets into each state, and command 1 of it into each state of a command.
READY: Final = [MESSAGES[Hello], MESSAGES[Seed], Seeded(NONCE)]
AFTER_OPEN: Final[dict[State, list[Message]]] = {
    State.OPEN: [],
    State.HOLDING: [MESSAGES[Hold]],
    State.HELD: [MESSAGES[Hold], MESSAGES[Held]],
    State.RESEEDING: [MESSAGES[Hold], MESSAGES[Held], MESSAGES[Seed]],
    State.CLOSING: [CLOSE_NOW],
    State.CLOSED: [CLOSE_NOW, CLOSED],
    State.FAILED: [MESSAGES[Failed]],
}
TO_SESSION: Final[dict[State, list[Message]]] = {
    State.WAITING: [],
    State.GREETED: READY[:1],
    State.WARMING: [MESSAGES[Hello], MESSAGES[Warm]],
    State.WARM: [MESSAGES[Hello], MESSAGES[Warm], Warmed()],
    State.SEEDING: READY[:2],
    State.READY: READY,
    **{state: [*READY, OPEN] for state in AFTER_OPEN},
}
TO_COMMAND: Final[dict[CommandState | None, list[Message]]] = {
    None: [],
    CommandState.STARTING: [MESSAGES[Exec]],
    CommandState.RUNNING: [MESSAGES[Exec], Started(1)],
    CommandState.ENDED: [MESSAGES[Exec], Started(1), EXITED],
}
SITUATIONS: Final = [
    (state, command)
    for state, command in itertools.product(State, [None, *CommandState])
    if command is None or state in AFTER_OPEN
]


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


def credit(number: int, count: int) -> bytes:
    """Return a frame of credit."""
    return frame(streams.CREDIT, number, count.to_bytes(4, "big"))


def execute(number: int) -> Exec:
    """Return a command with this id."""
    return Exec(number, ["true"], {}, "/", LIMITS)


def steps_to(state: State, command: CommandState | None = None) -> list[Message]:
    """Return the messages that lead to a state, with command 1 in a state."""
    return [*TO_SESSION[state], *TO_COMMAND[command], *AFTER_OPEN.get(state, [])]


def link_in(role: Role, state: State, command: CommandState | None = None) -> Link:
    """Return one end that has reached a state, with command 1 in a state."""
    link = Link(role)
    for one in steps_to(state, command):
        if FORMS[type(one)].sender is role:
            link.send(one)
        else:
            assert same(list(link.receive(message(one))), [one])
    taken(link)
    assert link.state is state
    return link


def pair_in(state: State, command: CommandState | None = None) -> tuple[Link, Link]:
    """Return host and guest in the same state."""
    return link_in(HOST, state, command), link_in(GUEST, state, command)


def taken(end: Link | streams.Streams) -> bytes:
    """Return all bytes that one end has to send."""
    sender = end.streams if isinstance(end, Link) else end
    out = b""
    while data := sender.data_to_send():
        sender.sent(len(data))
        out += data
    assert not sender.pending()
    return out


def carry(sender: Link, receiver: Link) -> list[Message | Event]:
    """Deliver all pending bytes of one end to the other."""
    return list(receiver.receive(taken(sender)))


def exchange(host: Link, guest: Link, *messages: Message) -> None:
    """Send messages, each by its sender, and deliver each with what was queued before it."""
    for one in messages:
        by, to = (host, guest) if FORMS[type(one)].sender is HOST else (guest, host)
        by.send(one)
        assert carry(by, to)[-1] == one


def same(one: list[Message | Event], other: list[Any]) -> bool:
    """Return whether both are equal, with their types: tuples of two types may be equal."""
    return [(type(item), item) for item in one] == [(type(item), item) for item in other]


def check_remembered(link: Link) -> None:
    """Check that a link remembers a limited number of streams and commands."""
    assert len(link.streams._open) <= STREAMS_MAX  # noqa: SLF001 - the bounds are the promise
    assert len(link._subjects) <= STREAMS_MAX  # noqa: SLF001
    assert len(link._commands) <= COMMANDS_MAX  # noqa: SLF001
    assert len(link._used) <= USED_MAX  # noqa: SLF001
