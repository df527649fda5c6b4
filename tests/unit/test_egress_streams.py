"""The streams between the relay in the guest and the egress gate: targets, answers and bounds."""

from __future__ import annotations

import contextlib
import struct
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.fuzz_channel import frame
from tests.fuzz.fuzz_egress import HELD_MAX, one_input
from x07_sandbox.channel import egress, streams
from x07_sandbox.channel.egress import DATA_MAX, TCP, UDP, WINDOW, Target
from x07_sandbox.channel.streams import HEADER, Event, Role, Streams
from x07_sandbox.errors import ChannelUsageError, PeerError

HTTPS: Final = Target(TCP, b"a.example", 443)


def asking(stream: int, transport: int = TCP, host: bytes = b"a.example", port: int = 443) -> bytes:
    """A frame that opens a flow."""
    return frame(streams.OPEN, stream, struct.pack(">H", port) + host, transport)


def refusal(transport: int = TCP, host: bytes = b"a.example", stream: int = 0) -> bytes:
    """A frame that reports a refusal."""
    return frame(streams.MESSAGE, stream, struct.pack(">BH", transport, 443) + host, egress.REFUSAL)


def credit(stream: int, count: int) -> bytes:
    """A frame of credit."""
    return frame(streams.CREDIT, stream, struct.pack(">I", count))


def passed(sender: Streams, receiver: Streams) -> list[Event]:
    """Deliver all pending bytes of one end to the other; return the events."""
    events: list[Event] = []
    while data := sender.data_to_send():
        sender.sent(len(data))
        events += receiver.receive(data)
    return events


def both(*transports: int) -> tuple[Streams, Streams, list[int]]:
    """The guest's and the gate's end with open flows, and the numbers of their streams."""
    guest, gate = Streams(Role.GUEST, egress.STREAMS), Streams(Role.HOST, egress.STREAMS)
    numbers = []
    for transport in transports:
        numbers.append(guest.open(transport, Target(transport, b"a.example", 443).opening()))
        passed(guest, gate)
        gate.answer(numbers[-1])
    passed(gate, guest)
    return guest, gate, numbers


def test_a_connection_from_its_opening_to_its_end() -> None:
    """Host, port, data and both ends arrive unchanged, and then the flow is forgotten."""
    guest, gate, _ = both()
    stream = guest.open(TCP, HTTPS.opening())
    [event] = passed(guest, gate)
    assert (event.type, event.stream, event.code) == (streams.OPEN, stream, TCP)
    assert egress.opened(event.code, event.data) == HTTPS
    gate.answer(stream)
    assert passed(gate, guest) == [Event(streams.ANSWER, stream, egress.OK)]
    assert guest.send(stream, b"question") == 8
    guest.finish(stream)
    assert passed(guest, gate) == [Event(streams.DATA, stream, TCP, b"question"), Event(streams.FIN, stream, TCP)]
    assert gate.send(stream, b"answer") == 6
    gate.finish(stream)
    assert passed(gate, guest) == [Event(streams.DATA, stream, TCP, b"answer"), Event(streams.FIN, stream, TCP)]
    assert not guest.is_open(stream)
    assert not gate.is_open(stream)


def test_datagrams_keep_their_borders() -> None:
    """Datagrams keep their boundaries up to the largest of UDP, and a larger one is dropped."""
    guest, gate, [number] = both(UDP)
    sent = [b"", b"x", bytes(egress.DATAGRAM_MAX)]
    for data in [*sent, bytes(egress.DATAGRAM_MAX + 1)]:
        guest.send_datagram(number, data)
    assert passed(guest, gate) == [Event(streams.DATAGRAM, number, UDP, data) for data in sent]


@pytest.mark.parametrize("code", range(1, egress.NO_NAME + 1))
def test_a_refusal_carries_its_reason(code: int) -> None:
    """A refusal or reset carries its code."""
    guest, gate, [open_one] = both(TCP)
    asked = guest.open(TCP, HTTPS.opening())
    passed(guest, gate)
    gate.answer(asked, code)
    gate.reset(open_one, code)
    assert passed(gate, guest) == [Event(streams.ANSWER, asked, code), Event(streams.RESET, open_one, code)]


@given(st.sampled_from([TCP, UDP]), st.binary(min_size=1, max_size=egress.HOST_MAX), st.integers(0, 2**16 - 1))
def test_targets_come_back_as_they_were(transport: int, host: bytes, port: int) -> None:
    """Any host and port survive, both in an opening and in a report."""
    target = Target(transport, host, port)
    assert egress.opened(transport, target.opening()) == target
    assert egress.refused(target.refusal()) == target


def test_only_what_fits_can_be_asked_for() -> None:
    """An empty or oversized host name, and an OPEN from the gate, raise ChannelUsageError."""
    guest, gate, _ = both()
    for host in (b"", b"x" * (egress.HOST_MAX + 1)):
        with pytest.raises(ChannelUsageError):
            guest.open(TCP, Target(TCP, host, 443).opening())
        with pytest.raises(ChannelUsageError):
            guest.message(egress.REFUSAL, Target(TCP, host, 443).refusal())
    for call in (lambda: gate.open(TCP, HTTPS.opening()), lambda: gate.message(egress.REFUSAL, HTTPS.refusal())):
        with pytest.raises(ChannelUsageError):
            call()
    assert guest.pending() == gate.pending() == 0
    guest.open(TCP, Target(TCP, b"x" * egress.HOST_MAX, 443).opening())
    assert len(passed(guest, gate)) == 1


def test_the_guest_reports_its_own_refusals() -> None:
    """The guest reports connections that it refused itself, without opening a flow."""
    guest, gate, _ = both()
    target = Target(UDP, b"unlisted.example", 0)
    guest.message(egress.REFUSAL, target.refusal())
    [event] = passed(guest, gate)
    assert (event.type, event.stream, event.code) == (streams.MESSAGE, 0, egress.REFUSAL)
    assert egress.refused(event.data) == target
    assert not gate._open  # noqa: SLF001 - nothing was opened


TOO_MUCH: Final = frame(streams.DATA, 1, bytes(DATA_MAX)) * (WINDOW // DATA_MAX)
# What a guest sends to a gate that has flow 1 (TCP) and flow 3 (UDP) open.
TO_GATE: Final = {
    "REFUSAL with a stream": refusal(stream=1),
    "REFUSAL without a host": refusal(host=b""),
    "REFUSAL with a long host": refusal(host=b"x" * 256),
    "another message": frame(streams.MESSAGE, 0, b"\x06\x01\xbbx", 2),
    "ANSWER is the gate's": frame(streams.ANSWER, 1),
    "code out of range": frame(streams.RESET, 1, code=egress.NO_NAME + 1),
    "data too long": HEADER.pack(streams.DATA, 0, 0, 1, DATA_MAX + 1),
    "datagram too long": HEADER.pack(streams.DATAGRAM, 0, 0, 3, egress.DATAGRAM_MAX + 1),
    "empty host": asking(5, host=b""),
    "host too long": asking(5, host=b"x" * 256),
    "no port": frame(streams.OPEN, 5, b"\x01", TCP),
    "unknown transport": asking(5, 1),
    "past credit": TOO_MUCH + frame(streams.DATA, 1, b"x"),
    "more credit than the window": credit(1, 1),
    "DATAGRAM on TCP": frame(streams.DATAGRAM, 1, b"x"),
    "DATA on UDP": frame(streams.DATA, 3, b"x"),
    "CREDIT on UDP": credit(3, 1),
    "DATA before ANSWER": asking(5) + frame(streams.DATA, 5, b"x"),
}
# What a gate sends to a guest that has asked for flow 1 (TCP).
TO_GUEST: Final = {
    "OPEN is the guest's": asking(2),
    "REFUSAL is the guest's": refusal(),
    "code out of range": frame(streams.ANSWER, 1, code=egress.NO_NAME + 1),
    "past credit": frame(streams.ANSWER, 1) + TOO_MUCH + frame(streams.DATA, 1, b"x"),
    "DATA before ANSWER": frame(streams.DATA, 1, b"x"),
    "DATAGRAM on TCP": frame(streams.ANSWER, 1) + frame(streams.DATAGRAM, 1, b"x"),
}


@pytest.mark.parametrize("name", TO_GATE)
def test_a_violation_of_the_guest_is_an_error(name: str) -> None:
    """An invalid frame from the guest ends the egress stream for good."""
    _, gate, numbers = both(TCP, UDP)
    assert numbers == [1, 3]
    check_failed(gate, TO_GATE[name], asking(101))


@pytest.mark.parametrize("name", TO_GUEST)
def test_a_violation_of_the_gate_is_an_error(name: str) -> None:
    """An invalid frame from the gate ends the egress stream for good."""
    guest, _, _ = both()
    guest.open(TCP, HTTPS.opening())
    check_failed(guest, TO_GUEST[name], frame(streams.RESET, 1))


def check_failed(link: Streams, data: bytes, good: bytes) -> None:
    """Check that the end of *data* is rejected, and that the stream stays failed."""
    for wire in (data + good, good):
        with pytest.raises(PeerError):
            list(link.receive(wire))


@pytest.mark.parametrize("transport", sorted(set(range(256)) - {TCP, UDP}))
def test_a_report_names_a_transport(transport: int) -> None:
    """A report about any other transport than TCP and UDP raises PeerError."""
    with pytest.raises(PeerError, match=f"transport {transport}"):
        egress.refused(Target(transport, b"x", 1).refusal())


MEANT: Final = [
    *[asking(stream, transport) for stream in (1, 3, 5) for transport in (TCP, UDP)],
    *[frame(kind, stream) for kind in (streams.ANSWER, streams.FIN, streams.RESET) for stream in (1, 3, 5)],
    *[frame(streams.DATA, stream, b"data") for stream in (1, 3, 5)],
    *[frame(streams.DATAGRAM, stream, b"data") for stream in (1, 3, 5)],
    *[credit(stream, WINDOW // 2) for stream in (1, 3, 5)],
    frame(streams.DATA, 1, bytes(DATA_MAX)),
    frame(streams.CREDIT, 1, b"\xff" * 4),
    refusal(),
    refusal(1),
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


@given(st.sampled_from(Role), st.lists(st.binary(min_size=1, max_size=1 << 17), max_size=4))
def test_no_more_than_one_frame_is_held(role: Role, parts: list[bytes]) -> None:
    """One end buffers at most one incomplete frame."""
    link = Streams(role, egress.STREAMS)
    for part in [HEADER.pack(streams.DATAGRAM, 0, 0, 1, egress.DATAGRAM_MAX), *parts]:
        with contextlib.suppress(PeerError):
            list(link.receive(part))
        assert len(link._in) <= HELD_MAX  # noqa: SLF001 - the bound on it is the promise
