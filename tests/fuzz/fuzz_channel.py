"""Fuzz target: the channel between host and guest.

An input is a byte of switches, the sizes of the pieces in which the stream is read, and the stream itself:

    bit 7        1: we are the guest, and the bytes come from a host; 0: we are the host
    bit 6        1: a stalled reader, who never takes what has arrived
    bits 0 to 3  number of size bytes that follow; a size byte N cuts off N + 1 bytes, and the sizes repeat

Our side answers as a correct host or agent does. Invariants:

* only events or PeerError come out, and after a PeerError always the same one;
* the state changes only along NEXT;
* buffered input is at most one frame that the peer may send; queued output is at most what we sent ourselves plus
  one credit frame for each quarter of a window;
* no stream has more than WINDOW bytes in flight;
* events and errors do not depend on how the stream was cut.
"""

from __future__ import annotations

from typing import Final

from x07_sandbox.channel.frames import CONTROL_MAX, DATA_MAX, HEADER, START_MAX, WINDOW, Kind, Role, Stream
from x07_sandbox.channel.link import NEXT, Control, Credit, Data, Eof, Event, Link, State
from x07_sandbox.errors import PeerError

ENTROPY: Final = b"e" * 64
NONCE: Final = b"n" * 16
SEED: Final[dict[str, object]] = {
    "unix_ns": 1,
    "entropy": ENTROPY,
    "nonce": NONCE,
    "machine_id": b"m" * 16,
}
START: Final[dict[str, object]] = {
    "run_id": "1-2-3-run",
    "hostname": "x07",
    "phase": "run",
    "argv": ["true"],
    "env": {},
    "cwd": "/",
    "files": [],
    "mounts": [],
    "limits": {},
    "confine": {"threads": True, "spawn": True, "execute": True, "programs": None, "prefixes": []},
    "output": None,
    "network": None,
    "left": None,
    "room": None,
}
DENIED: Final[dict[str, object]] = {
    "by": "kernel",
    "call": "openat",
    "errno": 13,
    "path": "/root/x",
    "write": False,
    "count": 1,
}
EXITED: Final[dict[str, object]] = {
    "wait_status": 0,
    "cpu_us": 1,
    "memory_peak_bytes": 1,
    "oom_kills": 0,
    "tasks_peak": 1,
    "tasks_refused": 0,
    "cpu_exceeded": False,
    "stopped": False,
    "disk_full": False,
    "memory_full": False,
    "denials_lost": 0,
    "left_files": 0,
    "left_bytes": 0,
    "output_bytes": None,
    "output_problem": None,
}
ANSWERS: Final[dict[tuple[Role, Kind], tuple[Kind, dict[str, object]]]] = {
    (Role.HOST, Kind.HELLO): (Kind.SEED, SEED),
    (Role.HOST, Kind.SEEDED): (Kind.START, START),
    (Role.HOST, Kind.STARTED): (Kind.STOP, {}),
    (Role.GUEST, Kind.WARM): (Kind.WARMED, {}),
    (Role.GUEST, Kind.SEED): (Kind.SEEDED, {"nonce": NONCE}),
    (Role.GUEST, Kind.START): (Kind.STARTED, {}),
    (Role.GUEST, Kind.STOP): (Kind.EXITED, EXITED),
}
# What we send once allowed: more than a window, so that all of it is in flight and the peer may send credit.
OWN_STREAMS: Final = {
    (Role.HOST, Kind.START): Stream.STDIN,
    (Role.GUEST, Kind.STARTED): Stream.STDOUT,
    (Role.GUEST, Kind.EXITED): Stream.OUTPUT_FILE,
}
OUR_BYTES: Final = bytes(WINDOW + 1)
HELD_MAX: Final = {
    Role.HOST: HEADER.size + max(CONTROL_MAX, DATA_MAX),
    Role.GUEST: HEADER.size + max(CONTROL_MAX, DATA_MAX, START_MAX),
}
CREDIT_FRAME: Final = HEADER.size + 4


class Side:
    """One end of the channel: answers correctly, and checks the invariants after each event."""

    def __init__(self, role: Role, *, stalled: bool) -> None:
        self.link = Link(role)
        self.stalled = stalled
        self.state = State.WAITING
        self.events: list[Event] = []
        self.error: PeerError | None = None
        self.on_the_way: dict[int, int] = {}
        self.ended: set[int] = set()
        self.data_bytes = 0
        self.queued = 0
        if role is Role.GUEST:
            self._send(Kind.HELLO, {"protocol": 1})

    def feed(self, piece: bytes) -> None:
        """Feed a piece of the stream."""
        try:
            for event in self.link.receive(piece):
                self._take(event)
        except PeerError as exc:
            self._fault(exc)
        else:
            assert self.error is None, "the link came back to life"
            held = len(self.link._in)  # noqa: SLF001 - the bound on it is the promise
            assert held <= HELD_MAX[self.link.role], f"{held} bytes are held"
        assert self.link.state is self.state
        assert self.link.pending() <= self.queued + CREDIT_FRAME * (self.data_bytes // (WINDOW // 4))

    def _fault(self, exc: PeerError) -> None:
        assert self.error is None or exc is self.error
        self.error = exc

    def _take(self, event: Event) -> None:
        assert self.error is None, "an event after the fault"
        self.events.append(event)
        match event:
            case Control(kind):
                self.state = NEXT[self.state, kind]
                self._answer(kind)
            case Data(stream, payload):
                self._take_data(stream, payload)
            case Eof(stream):
                assert stream not in self.ended
                self.ended.add(stream)
            case Credit(stream):
                assert 0 < self.link.window(stream) <= WINDOW
        assert self.link.state is self.state

    def _take_data(self, stream: int, payload: bytes) -> None:
        assert 0 < len(payload) <= DATA_MAX
        assert stream not in self.ended
        way = self.on_the_way.get(stream, 0) + len(payload)
        assert way <= WINDOW, f"{way} bytes of stream {stream} are on the way"
        self.on_the_way[stream] = way
        self.data_bytes += len(payload)
        if not self.stalled:
            before = self.link.pending()
            self.link.consumed(stream, len(payload))
            if self.link.pending() > before:  # only now may the peer send as much again
                self.on_the_way[stream] = 0

    def _answer(self, kind: Kind) -> None:
        answer = ANSWERS.get((self.link.role, kind))
        if answer is None or (self.state, answer[0]) not in NEXT:
            return
        self._send(*answer)
        stream = OWN_STREAMS.get((self.link.role, answer[0]))
        if stream is not None:
            before = self.link.pending()
            assert self.link.send_data(stream, OUR_BYTES) == WINDOW
            self.queued += self.link.pending() - before

    def _send(self, kind: Kind, body: dict[str, object]) -> None:
        before = self.link.pending()
        self.link.send(kind, body)
        self.state = NEXT[self.state, kind]
        self.queued += self.link.pending() - before


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
