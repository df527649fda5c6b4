"""Fuzz target: the streams of connections, for the guest's end and for the gate's.

An input is a byte of switches, the sizes of the pieces in which the stream is read, and the stream itself:

    bit 7        1: we are the guest, and the bytes come from a gate; 0: we are the gate
    bit 6        1: a stalled reader, who never takes what has arrived
    bits 0 to 3  number of size bytes that follow; a size byte N cuts off N + 1 bytes, and the sizes repeat

The gate answers every OPEN; the guest has already asked for four flows. Both send as much as the window takes on the
first TCP flow that opens. Invariants:

* only events or PeerError come out, and nothing after a PeerError;
* at most one frame of the input is held, and a limited number of flows;
* no stream has more than WINDOW bytes in flight, in either direction;
* nothing arrives on a stream before it is open or after its end;
* queued output is bounded by the answers and by what we sent ourselves;
* the events do not depend on how the stream was cut.
"""

from __future__ import annotations

from typing import Final

from tests.fuzz.fuzz_channel import pieces
from x07_sandbox.channel import egress, streams
from x07_sandbox.channel.egress import DATA_MAX, FLOWS_MAX, TCP, UDP, WINDOW, Target
from x07_sandbox.channel.streams import HEADER, Event, Role, Streams
from x07_sandbox.errors import PeerError

HELD_MAX: Final = HEADER.size + max(egress.DATA_MAX, egress.DATAGRAM_MAX)
OWN_FLOWS: Final = ((TCP, b"a.example"), (UDP, b"a.example"), (TCP, b"93.184.215.14"), (TCP, b"b.example"))
OUR_BYTES: Final = bytes(WINDOW + 1)
ANSWERS: Final = (egress.OK, egress.OK, egress.POLICY)  # in turn


class Side:
    """One end: answers correctly, and checks the invariants after each event."""

    def __init__(self, role: Role, *, stalled: bool) -> None:
        self.link = Streams(role, egress.STREAMS)
        self.stalled = stalled
        self.events: list[Event] = []
        self.failed = False
        self.on_the_way: dict[int, int] = {}
        self.ended: set[int] = set()
        self.gone: set[int] = set()
        self.open: dict[int, int] = {}  # transports, by stream
        self.asked: dict[int, int] = {}
        self.ours = 0  # the flow that we send on
        self.allowed = 0  # bytes that may be queued
        if role is Role.GUEST:
            for transport, host in OWN_FLOWS:
                self.asked[self.link.open(transport, Target(transport, host, 443).opening())] = transport
            self._sent_all()

    def _sent_all(self) -> None:
        while data := self.link.data_to_send():
            self.link.sent(len(data))

    def feed(self, piece: bytes) -> None:
        """Feed a piece of the stream."""
        try:
            for event in self.link.receive(piece):
                self._take(event)
        except PeerError:
            self.failed = True
        else:
            assert not self.failed, "the link came back to life"
        held = len(self.link._in)  # noqa: SLF001 - the bound on it is the promise
        assert held <= HELD_MAX, f"{held} bytes are held"
        assert len(self.link._open) <= 2 * FLOWS_MAX  # noqa: SLF001
        assert self.link.pending() <= self.allowed

    def _take(self, event: Event) -> None:
        assert not self.failed, "an event after the fault"
        self.events.append(event)
        stream = event.stream
        assert stream not in self.gone
        if event.type == streams.MESSAGE:
            self._refused(event)
        elif event.type == streams.OPEN:
            self._answer(event)
        elif event.type == streams.ANSWER:
            self._opened(stream, self.asked[stream], event.code)
        elif event.type == streams.RESET:
            self._gone(stream)
        else:
            self._take_open(event)

    def _take_open(self, event: Event) -> None:
        stream = event.stream
        assert stream in self.open, "something came before the stream was open"
        if event.type == streams.CREDIT:
            assert 0 < self.link.window(stream) <= WINDOW
            self._send(stream)
            return
        assert stream not in self.ended
        if event.type == streams.FIN:
            self.ended.add(stream)
        else:
            assert (event.type == streams.DATAGRAM) == (self.open[stream] == UDP)
            if event.type == streams.DATA:
                self._take_data(stream, event.data)

    def _refused(self, event: Event) -> None:
        assert not event.stream
        try:
            target = egress.refused(event.data)
        except PeerError:
            self.link.fail()
            raise
        assert 0 < len(target.host) <= egress.HOST_MAX

    def _answer(self, event: Event) -> None:
        assert self.link.role is Role.HOST
        target = egress.opened(event.code, event.data)
        assert target.transport in {TCP, UDP}
        assert 0 < len(target.host) <= egress.HOST_MAX
        code = ANSWERS[len(self.events) % len(ANSWERS)]
        self.allowed += HEADER.size
        self.link.answer(event.stream, code)
        self._opened(event.stream, target.transport, code)

    def _opened(self, stream: int, transport: int, code: int) -> None:
        if code:
            self._gone(stream)
            return
        self.open[stream] = transport
        if not self.ours and transport == TCP:
            self.ours = stream
        self._send(stream)

    def _send(self, stream: int) -> None:
        if stream != self.ours:
            return
        room = self.link.window(stream)
        assert self.link.send(stream, OUR_BYTES) == room
        self.allowed += room + HEADER.size * (room // DATA_MAX + 1)

    def _take_data(self, stream: int, data: bytes) -> None:
        assert 0 < len(data) <= DATA_MAX
        way = self.on_the_way.get(stream, 0) + len(data)
        assert way <= WINDOW, f"{way} bytes of stream {stream} are on the way"
        self.on_the_way[stream] = way
        if not self.stalled:
            before = self.link.pending()
            self.link.consumed(stream, len(data))
            if (queued := self.link.pending() - before) > 0:  # only now may the peer send as much again
                self.on_the_way[stream] = 0
                self.allowed += queued

    def _gone(self, stream: int) -> None:
        self.open.pop(stream, None)
        self.gone.add(stream)
        assert not self.link.window(stream)


def play(role: Role, parts: list[bytes], *, stalled: bool) -> Side:
    """Return a side that was fed these pieces and then two empty ones."""
    side = Side(role, stalled=stalled)
    for part in [*parts, b"", b""]:
        side.feed(part)
    return side


def one_input(data: bytes) -> None:
    """Check one input. Raises AssertionError, or any exception that the code under test must not raise."""
    if not data:
        return
    role, stalled = Role.GUEST if data[0] & 0x80 else Role.HOST, bool(data[0] & 0x40)
    count = data[0] & 0x0F
    stream = data[1 + count :]
    cut = play(role, pieces(stream, data[1 : 1 + count]), stalled=stalled)
    whole = play(role, [stream], stalled=stalled)
    assert cut.events == whole.events
    assert cut.failed == whole.failed
