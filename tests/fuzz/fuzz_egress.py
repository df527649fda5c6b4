"""What the frames of connections keep to, whatever bytes come, for the end in the guest and for the gate's.

An input is a byte of switches, the sizes of the pieces in which the stream is read, and the stream itself:

    bit 7        1: we are the guest, and the bytes come from a gate; 0: we are the gate
    bit 6        1: a stalled reader, who never takes what has come
    bits 0 to 3  how many bytes of sizes follow; a size byte N cuts N + 1 bytes off, and the sizes come round again

The gate answers every OPEN; the guest has asked for four flows already. Both send as much as the window takes on the
first TCP flow that opens. What must hold:

* only events or PeerError come out, and after a PeerError nothing else any more;
* no more than one frame of the input is held;
* no stream has more than WINDOW bytes on the way, in either direction;
* nothing comes on a stream before it is open, nor after its end;
* what is queued is bounded by the answers and by what we sent ourselves;
* the events do not depend on how the stream was cut.
"""

from __future__ import annotations

from typing import Final

from tests.fuzz.fuzz_channel import pieces
from x07_sandbox.channel import egress
from x07_sandbox.channel.egress import DATA_MAX, HEADER, TCP, UDP, WINDOW, EgressLink, Event
from x07_sandbox.errors import PeerError

HELD_MAX: Final = HEADER.size + max(egress.DATA_MAX, egress.DATAGRAM_MAX)
OWN_FLOWS: Final = ((TCP, b"a.example"), (UDP, b"a.example"), (TCP, b"93.184.215.14"), (TCP, b"b.example"))
OUR_BYTES: Final = bytes(WINDOW + 1)
ANSWERS: Final = (egress.OK, egress.OK, egress.POLICY)  # in turn


class Side:
    """One end that answers, and checks after each event that the promises hold."""

    def __init__(self, *, guest: bool, stalled: bool) -> None:
        self.link = EgressLink(guest=guest)
        self.stalled = stalled
        self.events: list[Event] = []
        self.failed = False
        self.on_the_way: dict[int, int] = {}
        self.ended: set[int] = set()
        self.gone: set[int] = set()
        self.open: set[int] = set()
        self.ours = 0  # the flow that we send on
        self.allowed = 0  # bytes that may be queued
        if guest:
            for transport, host in OWN_FLOWS:
                self.link.open(transport, host, 443)
            self._sent_all()

    def _sent_all(self) -> None:
        while data := self.link.data_to_send():
            self.link.sent(len(data))

    def feed(self, piece: bytes) -> None:
        """Take a piece of the stream."""
        try:
            for event in self.link.receive(piece):
                self._take(event)
        except PeerError:
            self.failed = True
        else:
            assert not self.failed, "the link came back to life"
        held = len(self.link._in)  # noqa: SLF001 - the bound on it is the promise
        assert held <= HELD_MAX, f"{held} bytes are held"
        assert self.link.pending() <= self.allowed

    def _take(self, event: Event) -> None:
        assert not self.failed, "an event after the fault"
        self.events.append(event)
        stream = event.stream
        assert stream not in self.gone
        if event.kind == egress.REFUSAL:
            assert not stream
        elif event.kind == egress.OPEN:
            self._answer(event)
        elif event.kind == egress.OPENED:
            self._opened(stream, event.value)
        elif event.kind == egress.RESET:
            self._gone(stream)
        else:
            assert stream in self.open, "something came before the stream was open"
            if event.kind == egress.DATA:
                self._take_data(stream, event.data)
            elif event.kind == egress.FIN:
                assert stream not in self.ended
                self.ended.add(stream)
            elif event.kind == egress.CREDIT:
                assert 0 < self.link.window(stream) <= WINDOW
                self._send(stream)

    def _answer(self, event: Event) -> None:
        assert not self.link.guest
        assert event.transport in {TCP, UDP}
        assert 0 < len(event.data) <= egress.HOST_MAX
        code = ANSWERS[len(self.events) % len(ANSWERS)]
        self.allowed += HEADER.size
        self.link.opened(event.stream, code)
        self._opened(event.stream, code)

    def _opened(self, stream: int, code: int) -> None:
        if code:
            self._gone(stream)
            return
        self.open.add(stream)
        if not self.ours and self.link.flows[stream].transport == TCP:
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
        assert stream not in self.ended
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
        self.open.discard(stream)
        self.gone.add(stream)
        assert not self.link.window(stream)


def play(parts: list[bytes], *, guest: bool, stalled: bool) -> Side:
    """A side that was fed these pieces, and then nothing more, twice."""
    side = Side(guest=guest, stalled=stalled)
    for part in [*parts, b"", b""]:
        side.feed(part)
    return side


def one_input(data: bytes) -> None:
    """Check one input. Raises AssertionError, or whatever it was that should never have been raised."""
    if not data:
        return
    guest, stalled = bool(data[0] & 0x80), bool(data[0] & 0x40)
    count = data[0] & 0x0F
    stream = data[1 + count :]
    cut = play(pieces(stream, data[1 : 1 + count]), guest=guest, stalled=stalled)
    whole = play([stream], guest=guest, stalled=stalled)
    assert cut.events == whole.events
    assert cut.failed == whole.failed
