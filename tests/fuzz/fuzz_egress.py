"""Fuzz target: the streams of connections, for the guest's end and for the gate's.

`check_any_cut` in tests/guest/answering.py says what an input is, with the gate as the host. The gate answers every
OPEN; the guest has already asked for four flows. Both send as much as the window takes on the first TCP flow that
opens. Invariants:

* only events or PeerError come out, and nothing after a PeerError;
* at most one frame of the input is held, and a limited number of flows;
* no stream has more than WINDOW bytes in flight, in either direction;
* nothing arrives on a stream before it is open or after its end;
* queued output is bounded by the answers and by what we sent ourselves;
* the events do not depend on how the stream was cut.
"""

from __future__ import annotations

import struct
from typing import Final

from tests.guest.answering import Side, check_any_cut
from tests.guest.messages import credit, frame
from x07_sandbox.channel import egress, streams
from x07_sandbox.channel.egress import DATA_MAX, DATAGRAM_MAX, FLOWS_MAX, TCP, UDP, WINDOW, Target
from x07_sandbox.channel.messages import Message
from x07_sandbox.channel.streams import HEADER, Event, Role, Streams
from x07_sandbox.errors import PeerError

HELD_MAX: Final = HEADER.size + max(DATA_MAX, DATAGRAM_MAX)
OWN_FLOWS: Final = ((TCP, b"a.example"), (UDP, b"a.example"), (TCP, b"93.184.215.14"), (TCP, b"b.example"))
OUR_BYTES: Final = bytes(WINDOW + 1)
ANSWERS: Final = (egress.OK, egress.OK, egress.POLICY)  # in turn


def asking(stream: int, transport: int = TCP, host: bytes = b"a.example", port: int = 443) -> bytes:
    """Return a frame that opens a flow."""
    return frame(streams.OPEN, stream, struct.pack(">H", port) + host, transport)


def refusal(transport: int = TCP, host: bytes = b"a.example", stream: int = 0) -> bytes:
    """Return a frame that reports a refusal."""
    return frame(streams.MESSAGE, stream, struct.pack(">BH", transport, 443) + host, egress.REFUSAL)


FLOWS: Final = asking(1) + asking(3, UDP)
TOO_MUCH: Final = frame(streams.DATA, 1, bytes(DATA_MAX)) * (WINDOW // DATA_MAX)
# What a guest must not send to a gate, behind FLOWS.
TO_GATE: Final = {
    "REFUSAL with a stream": refusal(stream=1),
    "REFUSAL without a host": refusal(host=b""),
    "REFUSAL with a long host": refusal(host=b"x" * 256),
    "another message": frame(streams.MESSAGE, 0, b"\x06\x01\xbbx", 2),
    "ANSWER is the gate's": frame(streams.ANSWER, 1),
    "code out of range": frame(streams.RESET, 1, code=egress.NO_NAME + 1),
    "data too long": HEADER.pack(streams.DATA, 0, 0, 1, DATA_MAX + 1),
    "datagram too long": HEADER.pack(streams.DATAGRAM, 0, 0, 3, DATAGRAM_MAX + 1),
    "empty host": asking(5, host=b""),
    "host too long": asking(5, host=b"x" * 256),
    "no port": frame(streams.OPEN, 5, b"\x01", TCP),
    "unknown transport": asking(5, 1),
    "past credit": TOO_MUCH + frame(streams.DATA, 1, b"x"),
    "more credit than the window": credit(1, WINDOW + 1),
    "DATAGRAM on TCP": frame(streams.DATAGRAM, 1, b"x"),
    "DATA on UDP": frame(streams.DATA, 3, b"x"),
    "CREDIT on UDP": credit(3, 1),
    "DATA before ANSWER": asking(5) + frame(streams.DATA, 5, b"x"),
}
# What a gate must not send to a guest that has asked for flow 1 (TCP).
TO_GUEST: Final = {
    "OPEN is the guest's": asking(2),
    "REFUSAL is the guest's": refusal(),
    "code out of range": frame(streams.ANSWER, 1, code=egress.NO_NAME + 1),
    "past credit": frame(streams.ANSWER, 1) + TOO_MUCH + frame(streams.DATA, 1, b"x"),
    "DATA before ANSWER": frame(streams.DATA, 1, b"x"),
    "DATAGRAM on TCP": frame(streams.ANSWER, 1) + frame(streams.DATAGRAM, 1, b"x"),
}


class Flows(Side):
    """One end: answers correctly, and checks the invariants after each event."""

    def __init__(self, role: Role, *, stalled: bool) -> None:
        self.link = Streams(role, egress.STREAMS)
        super().__init__(self.link, HELD_MAX, WINDOW, stalled=stalled)
        self.ended: set[int] = set()
        self.gone: set[int] = set()
        self.open: dict[int, int] = {}  # transports, by stream
        self.asked: dict[int, int] = {}
        self.ours = 0  # the flow that we send on
        if role is Role.GUEST:
            for transport, host in OWN_FLOWS:
                self.asked[self.link.open(transport, Target(transport, host, 443).opening())] = transport
            while data := self.link.data_to_send():
                self.link.sent(len(data))

    def check(self) -> None:
        """Check the number of flows."""
        assert len(self.link._open) <= 2 * FLOWS_MAX  # noqa: SLF001 - the bound is the promise

    def take(self, event: Message | Event) -> None:
        """Check an event, and answer it."""
        assert isinstance(event, Event)
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
                assert len(event.data) <= DATA_MAX
                self.take_data(stream, event.data)

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

    def _gone(self, stream: int) -> None:
        self.open.pop(stream, None)
        self.gone.add(stream)
        assert not self.link.window(stream)


def seeds() -> dict[str, bytes]:
    """Return frames as relay and gate send them, and every violation."""
    gate, cut, stalled, guest = b"\x00", b"\x03\x00\x06\x12", b"\x41\x63", b"\x82\x08\x1f"
    data, fin = frame(streams.DATA, 1, b"hello"), frame(streams.FIN, 1)
    opened, reset, quarter = frame(streams.ANSWER, 1), frame(streams.RESET, 1), credit(1, WINDOW // 4)
    datagrams = frame(streams.DATAGRAM, 3, b"x") + frame(streams.DATAGRAM, 3)
    return {
        **{f"gate-{name}": gate + FLOWS + wire for name, wire in TO_GATE.items()},
        **{f"guest-{name}": guest + wire for name, wire in TO_GUEST.items()},
        "talk": cut + FLOWS + data + quarter + datagrams + data + fin + quarter,
        "refusals": gate + refusal() + refusal(UDP) + refusal(1),
        "reset": gate + asking(1) + data + reset + data + asking(5) + frame(streams.DATA, 5, b"x"),
        "stalled": stalled + asking(1) + data * 8,
        "guest": guest + opened + data + quarter + frame(streams.ANSWER, 3) + datagrams + fin + reset,
        "refused": guest + frame(streams.ANSWER, 1, code=egress.POLICY) + data + frame(streams.RESET, 5, code=4),
        "never-opened": gate + asking(1) + frame(streams.DATA, 3, b"x"),
        "numbers": gate + asking(7) + asking(5),
        # Input after a fault was kept.
        "found-kept-after-fault": gate + b"\xff" * 2000,
    }


def one_input(data: bytes) -> None:
    """Check one input. Raises AssertionError, or any exception that the code under test must not raise."""
    check_any_cut(data, lambda role, stalled: Flows(role, stalled=stalled))
