"""Frames between the relay in the guest and the egress gate."""

from __future__ import annotations

import contextlib
import random
import struct
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.fuzz_egress import HELD_MAX, one_input
from x07_sandbox.channel import egress
from x07_sandbox.channel.egress import DATA_MAX, HEADER, TCP, UDP, WINDOW, EgressLink, Event
from x07_sandbox.errors import ChannelUsageError, PeerError

HALF: Final = WINDOW // 2


def frame(kind: int, stream: int, payload: bytes = b"", *, code: int = 0, zero: int = 0) -> bytes:
    """A frame, valid or not."""
    return HEADER.pack(kind, code, zero, stream, len(payload)) + payload


def asking(stream: int, transport: int = TCP, host: bytes = b"a.example", port: int = 443) -> bytes:
    """A frame that opens a flow."""
    return frame(egress.OPEN, stream, struct.pack(">BH", transport, port) + host)


def credit(stream: int, count: int) -> bytes:
    """A frame of credit."""
    return frame(egress.CREDIT, stream, struct.pack(">I", count))


def taken(link: EgressLink) -> bytes:
    """All bytes that a link has to send."""
    out = b""
    while data := link.data_to_send():
        link.sent(len(data))
        out += data
    return out


def passed(sender: EgressLink, receiver: EgressLink) -> list[Event]:
    """Deliver all pending bytes of one end to the other; return the events."""
    return list(receiver.receive(taken(sender)))


def gate_with(*transports: int) -> EgressLink:
    """The gate's end, with flows 1, 2 and so on open."""
    gate = EgressLink(guest=False)
    for stream, transport in enumerate(transports, 1):
        list(gate.receive(asking(stream, transport)))
        gate.opened(stream)
    taken(gate)
    return gate


def both(*transports: int) -> tuple[EgressLink, EgressLink]:
    """Both ends, with flows 1, 2 and so on open."""
    guest, gate = EgressLink(guest=True), EgressLink(guest=False)
    for transport in transports:
        stream = guest.open(transport, b"a.example", 443)
        passed(guest, gate)
        gate.opened(stream)
    passed(gate, guest)
    return guest, gate


def test_a_connection_from_its_opening_to_its_end() -> None:
    """Host, port, data and both ends arrive unchanged, and then the flow is forgotten."""
    guest, gate = EgressLink(guest=True), EgressLink(guest=False)
    stream = guest.open(TCP, b"a.example", 443)
    assert passed(guest, gate) == [Event(egress.OPEN, stream, 443, b"a.example", TCP)]
    gate.opened(stream)
    assert passed(gate, guest) == [Event(egress.OPENED, stream, egress.OK)]
    assert guest.send(stream, b"question") == 8
    guest.finish(stream)
    assert passed(guest, gate) == [Event(egress.DATA, stream, data=b"question"), Event(egress.FIN, stream)]
    assert gate.send(stream, b"answer") == 6
    gate.finish(stream)
    gate.finish(stream)
    assert passed(gate, guest) == [Event(egress.DATA, stream, data=b"answer"), Event(egress.FIN, stream)]
    assert guest.flows == gate.flows == {}


def test_datagrams_keep_their_borders() -> None:
    """Datagrams keep their boundaries, and an oversized one is dropped."""
    guest, gate = both(UDP)
    sent = [b"", b"x", bytes(egress.DATAGRAM_MAX)]
    for data in [*sent, bytes(egress.DATAGRAM_MAX + 1)]:
        guest.send_datagram(1, data)
    assert passed(guest, gate) == [Event(egress.DATAGRAM, 1, data=data) for data in sent]


@pytest.mark.parametrize("code", range(1, egress.CODE_MAX + 1))
def test_a_refusal_carries_its_reason(code: int) -> None:
    """A refusal or reset carries its code and removes the flow at both ends."""
    guest, gate = EgressLink(guest=True), EgressLink(guest=False)
    stream = guest.open(TCP, b"a.example", 443)
    passed(guest, gate)
    gate.opened(stream, code)
    assert passed(gate, guest) == [Event(egress.OPENED, stream, code)]
    assert guest.flows == gate.flows == {}
    guest, gate = both(TCP)
    gate.reset(1, code)
    gate.reset(1, code)
    assert passed(gate, guest) == [Event(egress.RESET, 1, code)]
    assert guest.flows == gate.flows == {}


def test_nothing_is_sent_before_the_answer() -> None:
    """A flow accepts no bytes before its connection is open."""
    guest, gate = EgressLink(guest=True), EgressLink(guest=False)
    stream = guest.open(TCP, b"a.example", 443)
    passed(guest, gate)
    for link in (guest, gate):
        assert link.window(stream) == link.send(stream, b"early") == 0
        link.send_datagram(stream, b"early")
        assert taken(link) == b""


def test_operations_on_an_ended_flow_do_nothing() -> None:
    """Operations on an ended flow send nothing and raise nothing."""
    _, gate = both(TCP)
    gate.reset(1)
    taken(gate)
    gate.opened(1)
    gate.finish(1)
    gate.consumed(1, WINDOW)
    assert gate.send(1, b"x") == 0
    assert gate.pending() == 0


def test_only_what_fits_can_be_asked_for() -> None:
    """An empty or oversized host name, and an OPEN from the gate, raise ChannelUsageError."""
    guest = EgressLink(guest=True)
    for host in (b"", b"x" * (egress.HOST_MAX + 1)):
        with pytest.raises(ChannelUsageError):
            guest.open(TCP, host, 443)
    with pytest.raises(ChannelUsageError):
        EgressLink(guest=False).open(TCP, b"a.example", 443)
    assert guest.open(TCP, b"x" * egress.HOST_MAX, 443) == 1


def test_the_guest_reports_its_own_refusals() -> None:
    """The guest reports connections that it refused itself, without opening a flow."""
    guest, gate = EgressLink(guest=True), EgressLink(guest=False)
    guest.report_refusal(UDP, b"unlisted.example", 0)
    guest.report_refusal(TCP, b"", 443)
    assert passed(guest, gate) == [Event(egress.REFUSAL, 0, 0, b"unlisted.example", UDP)]
    assert gate.flows == {}


def test_queued_refusal_reports_are_bounded() -> None:
    """The queue of refusals to report is bounded."""
    guest = EgressLink(guest=True)
    for _ in range(10_000):
        guest.report_refusal(TCP, b"x" * egress.HOST_MAX, 443)
    assert guest.pending() <= WINDOW + HEADER.size + 3 + egress.HOST_MAX


TOO_MUCH: Final = frame(egress.DATA, 1, bytes(DATA_MAX)) * (WINDOW // DATA_MAX)
# What a guest sends to a gate that has flow 1 (TCP) and flow 2 (UDP) open.
TO_GATE: Final = {
    "unknown type 0": frame(0, 1),
    "unknown type": frame(9, 1),
    "REFUSAL with a stream": frame(egress.REFUSAL, 1, b"\x06\x01\xbbx"),
    "REFUSAL without a host": frame(egress.REFUSAL, 0, b"\x06\x01\xbb"),
    "REFUSAL with a long host": frame(egress.REFUSAL, 0, b"\x06\x01\xbb" + b"x" * 256),
    "REFUSAL of an unknown transport": frame(egress.REFUSAL, 0, b"\x01\x01\xbbx"),
    "highest type": frame(255, 1, b"x"),
    "OPENED is the gate's": frame(egress.OPENED, 1),
    "code of DATA": frame(egress.DATA, 1, b"x", code=1),
    "code of OPEN": b"\x01\x01" + asking(3)[2:],
    "code of CREDIT": b"\x04\x01" + credit(1, 1)[2:],
    "code of FIN": frame(egress.FIN, 1, code=1),
    "code out of range": frame(egress.RESET, 1, code=egress.CODE_MAX + 1),
    "zero field": frame(egress.DATA, 1, b"x", zero=1),
    "zero field, high byte": frame(egress.FIN, 1, zero=256),
    "stream 0": frame(egress.DATA, 0, b"x"),
    "OPEN of stream 0": asking(0),
    "data too long": HEADER.pack(egress.DATA, 0, 0, 1, DATA_MAX + 1),
    "no data": frame(egress.DATA, 1),
    "length 2^32-1": HEADER.pack(egress.DATA, 0, 0, 1, 2**32 - 1),
    "datagram too long": HEADER.pack(egress.DATAGRAM, 0, 0, 2, egress.DATAGRAM_MAX + 1),
    "FIN with payload": frame(egress.FIN, 1, b"x"),
    "RESET with payload": frame(egress.RESET, 1, b"x"),
    "short credit": frame(egress.CREDIT, 1, b"123"),
    "long credit": frame(egress.CREDIT, 1, b"12345"),
    "empty host": asking(3, host=b""),
    "host too long": asking(3, host=b"x" * 256),
    "no port": frame(egress.OPEN, 3, b"\x06\x01"),
    "unknown transport": asking(3, 1),
    "past credit": TOO_MUCH + frame(egress.DATA, 1, b"x"),
    "no credit": credit(1, 0),
    "more credit than the window": credit(1, 1),
    "highest credit": credit(1, 2**32 - 1),
    "OPEN of a stream that is open": asking(1),
    "OPEN of a stream that was closed": frame(egress.RESET, 2) + asking(2),
    "descending OPEN": asking(9) + asking(8),
    "OPEN twice": asking(3) + asking(3),
    "never opened": frame(egress.DATA, 3, b"x"),
    "credit of a flow never opened": credit(3, 1),
    "RESET of a flow never opened": frame(egress.RESET, 3),
    "DATA before OPENED": asking(3) + frame(egress.DATA, 3, b"x"),
    "CREDIT before OPENED": asking(3) + credit(3, 1),
    "FIN before OPENED": asking(3) + frame(egress.FIN, 3),
    "DATAGRAM before OPENED": asking(3, UDP) + frame(egress.DATAGRAM, 3, b"x"),
    "DATA after FIN": frame(egress.FIN, 1) + frame(egress.DATA, 1, b"x"),
    "FIN twice": frame(egress.FIN, 1) * 2,
    "DATAGRAM on TCP": frame(egress.DATAGRAM, 1, b"x"),
    "DATA on UDP": frame(egress.DATA, 2, b"x"),
    "FIN on UDP": frame(egress.FIN, 2),
    "CREDIT on UDP": credit(2, 1),
}
# What a gate sends to a guest that has asked for flow 1 (TCP).
TO_GUEST: Final = {
    "OPEN is the guest's": asking(2),
    "REFUSAL is the guest's": frame(egress.REFUSAL, 0, b"\x06\x01\xbbx"),
    "DATA before OPENED": frame(egress.DATA, 1, b"x"),
    "CREDIT before OPENED": credit(1, 1),
    "FIN before OPENED": frame(egress.FIN, 1),
    "OPENED twice": frame(egress.OPENED, 1) * 2,
    "a refusal after OPENED": frame(egress.OPENED, 1) + frame(egress.OPENED, 1, code=egress.POLICY),
    "OPENED of a stream never asked for": frame(egress.OPENED, 2),
    "OPENED with payload": frame(egress.OPENED, 1, b"x"),
    "code out of range": frame(egress.OPENED, 1, code=egress.CODE_MAX + 1),
    "past credit": frame(egress.OPENED, 1) + TOO_MUCH + frame(egress.DATA, 1, b"x"),
    "more credit than the window": frame(egress.OPENED, 1) + credit(1, 1),
    "DATAGRAM on TCP": frame(egress.OPENED, 1) + frame(egress.DATAGRAM, 1, b"x"),
}


@pytest.mark.parametrize("name", TO_GATE)
def test_a_violation_of_the_guest_is_an_error(name: str) -> None:
    """An invalid frame from the guest ends the link for good."""
    check_failed(gate_with(TCP, UDP), TO_GATE[name], asking(100))


@pytest.mark.parametrize("name", TO_GUEST)
def test_a_violation_of_the_gate_is_an_error(name: str) -> None:
    """An invalid frame from the gate ends the link for good."""
    guest = EgressLink(guest=True)
    guest.open(TCP, b"a.example", 443)
    check_failed(guest, TO_GUEST[name], frame(egress.RESET, 1))


def check_failed(link: EgressLink, data: bytes, good: bytes) -> None:
    """Check that the end of *data* is rejected, and that the link stays failed and buffers nothing."""
    with pytest.raises(PeerError):
        list(link.receive(data + good))
    for later in (b"", good, bytes(1 << 20), good):
        with pytest.raises(PeerError):
            list(link.receive(later))
    assert not link._in  # noqa: SLF001 - the bound on it is the promise


def test_events_before_a_violation_count() -> None:
    """Valid frames before a violation are reported, then the error."""
    gate = gate_with(TCP)
    events = gate.receive(frame(egress.DATA, 1, b"x") + frame(0, 1))
    assert next(events) == Event(egress.DATA, 1, data=b"x")
    with pytest.raises(PeerError):
        next(events)


def test_frames_that_cross_an_end_are_ignored() -> None:
    """Frames that cross the end of their flow on the wire are ignored."""
    late = [frame(egress.DATA, 1, b"x"), credit(1, HALF), frame(egress.FIN, 1), frame(egress.RESET, 1)]
    gate = gate_with(TCP, UDP)
    gate.reset(1)
    gate.reset(2)
    assert list(gate.receive(b"".join(late) + frame(egress.DATAGRAM, 2, b"x"))) == []
    refused = EgressLink(guest=False)
    list(refused.receive(asking(1)))
    refused.opened(1, egress.POLICY)
    assert list(refused.receive(frame(egress.RESET, 1))) == []
    guest = EgressLink(guest=True)
    guest.open(TCP, b"a.example", 443)
    guest.reset(1)
    assert list(guest.receive(frame(egress.OPENED, 1) + b"".join(late))) == []


def test_a_pending_connection_can_be_given_up() -> None:
    """A guest can cancel a connection before it is answered."""
    guest, gate = EgressLink(guest=True), EgressLink(guest=False)
    stream = guest.open(TCP, b"a.example", 443)
    passed(guest, gate)
    guest.reset(stream)
    assert passed(guest, gate) == [Event(egress.RESET, stream)]
    gate.opened(stream)
    assert gate.pending() == 0


def test_small_frames_overtake_data() -> None:
    """Answers, credit and resets overtake queued data; a flow's end does not."""
    guest, gate = both(TCP, TCP, TCP)
    waiting = guest.open(TCP, b"a.example", 443)
    guest.send(3, bytes(HALF))
    passed(guest, gate)
    gate.send(1, bytes(3 * DATA_MAX))
    gate.finish(1)
    gate.opened(waiting)
    gate.consumed(3, HALF)
    gate.reset(2)
    small = [(egress.OPENED, waiting), (egress.CREDIT, 3), (egress.RESET, 2)]
    kinds = [(event.kind, event.stream) for event in passed(gate, guest)]
    assert kinds == [*small, *[(egress.DATA, 1)] * 3, (egress.FIN, 1)]


def test_a_partly_written_frame_is_completed_first() -> None:
    """A partly written frame is completed before any other."""
    guest, gate = both(TCP, TCP)
    gate.send(1, b"x" * 100)
    beginning = bytes(gate.data_to_send()[:20])
    gate.sent(len(beginning))
    gate.reset(2)
    assert gate.pending() == 100 - 20 + 2 * HEADER.size
    events = list(guest.receive(beginning + taken(gate)))
    assert [event.kind for event in events] == [egress.DATA, egress.RESET]


def test_credit_comes_in_steps_of_half_a_window() -> None:
    """Credit is sent in steps of half a window, and none is lost."""
    guest, gate = both(TCP)
    assert guest.send(1, bytes(WINDOW + 1)) == WINDOW
    passed(guest, gate)
    assert guest.window(1) == 0
    for _ in range(HALF - 1):
        gate.consumed(1, 1)
    assert gate.pending() == 0
    gate.consumed(1, 1)
    assert passed(gate, guest) == [Event(egress.CREDIT, 1)]
    assert guest.window(1) == HALF


class Exchange:
    """Both ends, a pipe in each direction, and the bytes sent and received on each flow."""

    def __init__(self, flows: int) -> None:
        self.ends = dict(zip("gh", both(*[TCP] * flows), strict=True))
        self.pipes = {"g": bytearray(), "h": bytearray()}  # by sender
        self.sent = {(side, stream): bytearray() for side in "gh" for stream in range(1, flows + 1)}
        self.got = {key: bytearray() for key in self.sent}  # by sender
        self.used = dict.fromkeys(self.sent, 0)
        self.ended: set[tuple[str, int]] = set()

    def write(self, side: str, stream: int, data: bytes) -> None:
        """Send as much as the window allows."""
        link = self.ends[side]
        room = link.window(stream)
        count = link.send(stream, data)
        assert count == min(room, len(data))
        self.sent[side, stream] += data[:count]
        on_the_way = len(self.sent[side, stream]) - self.used[side, stream]
        assert on_the_way <= WINDOW

    def carry(self, side: str, count: int) -> None:
        """Take at most *count* bytes from a sender, and deliver as many of the pipe's at the other end."""
        link, pipe = self.ends[side], self.pipes[side]
        data = link.data_to_send()[:count]
        link.sent(len(data))
        pipe += data
        other = "h" if side == "g" else "g"
        for event in self.ends[other].receive(bytes(pipe[:count])):
            if event.kind == egress.DATA:
                self.got[side, event.stream] += event.data
            elif event.kind == egress.FIN:
                self.ended.add((side, event.stream))
        del pipe[:count]

    def use(self, side: str, stream: int, count: int) -> None:
        """The reader of *side*'s data consumes at most *count* bytes."""
        count = min(count, len(self.got[side, stream]) - self.used[side, stream])
        self.used[side, stream] += count
        self.ends["h" if side == "g" else "g"].consumed(stream, count)

    def settle(self) -> None:
        """Carry and consume until nothing moves."""
        while any(link.pending() for link in self.ends.values()) or any(self.pipes.values()):
            for side in "gh":
                self.carry(side, 1 << 20)
            for side, stream in self.sent:
                self.use(side, stream, WINDOW)


@given(st.integers(1, 4), st.integers(0, 2**32))
def test_no_byte_is_lost_in_long_exchanges(flows: int, seed: int) -> None:
    """All bytes arrive once, in order and within the window, under any interleaving."""
    choose = random.Random(seed)  # noqa: S311 - a test's
    exchange = Exchange(flows)
    for _ in range(300):
        side, stream = choose.choice("gh"), choose.randint(1, flows)
        match choose.randrange(3):
            case 0:
                size = choose.choice([1, 700, DATA_MAX, 3 * DATA_MAX])
                exchange.write(side, stream, choose.randbytes(size))
            case 1:
                exchange.carry(side, choose.choice([1, 11, 4096, 1 << 17]))
            case _:
                exchange.use(side, stream, choose.choice([1, 4096, HALF, WINDOW]))
    for side, stream in exchange.sent:
        exchange.ends[side].finish(stream)
    exchange.settle()
    assert exchange.got == exchange.sent
    assert exchange.ended == set(exchange.sent)
    assert exchange.ends["g"].flows == exchange.ends["h"].flows == {}


@given(st.integers(1, 3), st.integers(0, 2**32))
def test_windows_and_credit_add_up(flows: int, seed: int) -> None:
    """Window and pending credit always add up to the full window."""
    choose = random.Random(seed)  # noqa: S311 - a test's
    exchange = Exchange(flows)
    for _ in range(40):
        side, stream = choose.choice("gh"), choose.randint(1, flows)
        exchange.write(side, stream, bytes(choose.randint(1, WINDOW)))
        exchange.settle()
    for side, stream in exchange.sent:
        window = exchange.ends[side].window(stream)
        flow = exchange.ends["h" if side == "g" else "g"].flows[stream]
        assert WINDOW - HALF < window <= WINDOW
        assert window + flow.unacknowledged == WINDOW


MEANT: Final = [
    *[asking(stream, transport) for stream in (1, 2, 3) for transport in (TCP, UDP)],
    *[frame(kind, stream) for kind in (egress.OPENED, egress.FIN, egress.RESET) for stream in (1, 2, 3)],
    *[frame(egress.DATA, stream, b"data") for stream in (1, 2, 3)],
    *[frame(egress.DATAGRAM, stream, b"data") for stream in (1, 2, 3)],
    *[credit(stream, HALF) for stream in (1, 2, 3)],
    frame(egress.DATA, 1, bytes(DATA_MAX)),
    frame(egress.CREDIT, 1, b"\xff" * 4),
    frame(egress.REFUSAL, 0, b"\x06\x01\xbba.example"),
]


@given(st.booleans(), st.booleans(), st.binary(max_size=5), st.lists(st.sampled_from(range(len(MEANT))), max_size=12))
def test_the_cut_of_a_stream_does_not_matter(guest: bool, stalled: bool, sizes: bytes, frames: list[int]) -> None:  # noqa: FBT001 - as hypothesis gives them
    """A byte stream yields the same events and error, however it is cut."""
    first = guest << 7 | stalled << 6 | len(sizes)
    one_input(bytes([first]) + sizes + b"".join(MEANT[number] for number in frames))


@given(st.booleans(), st.binary(max_size=300))
def test_any_bytes_are_events_or_an_error(guest: bool, data: bytes) -> None:  # noqa: FBT001 - as above
    """Random bytes raise nothing but PeerError."""
    one_input(bytes([guest << 7 | 1, 2]) + data)


@given(st.booleans(), st.lists(st.binary(min_size=1, max_size=1 << 17), max_size=4))
def test_no_more_than_one_frame_is_held(guest: bool, parts: list[bytes]) -> None:  # noqa: FBT001 - as above
    """A link buffers at most one incomplete frame."""
    link = EgressLink(guest=guest)
    for part in [HEADER.pack(egress.DATAGRAM, 0, 0, 1, egress.DATAGRAM_MAX), *parts]:
        with contextlib.suppress(PeerError):
            list(link.receive(part))
        assert len(link._in) <= HELD_MAX  # noqa: SLF001 - the bound on it is the promise
