"""The streams between the relay in the guest and the egress gate: targets, reports and bounds.

What holds for streams of any table is in test_channel_streams.py and test_channel_exchange.py.
"""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.fuzz_egress import FLOWS, TO_GATE, TO_GUEST, asking
from tests.guest.messages import GUEST, HOST, frame, taken
from x07_sandbox.channel import egress, streams
from x07_sandbox.channel.egress import TCP, UDP, Target
from x07_sandbox.channel.streams import Streams
from x07_sandbox.errors import ChannelUsageError, PeerError

HTTPS: Final = Target(TCP, b"a.example", 443)


@given(st.sampled_from([TCP, UDP]), st.binary(min_size=1, max_size=egress.HOST_MAX), st.integers(0, 2**16 - 1))
def test_targets_come_back_as_they_were(transport: int, host: bytes, port: int) -> None:
    """Any host and port survive, both in an opening and in a report."""
    target = Target(transport, host, port)
    assert egress.opened(transport, target.opening()) == target
    assert egress.refused(target.refusal()) == target


def test_only_what_fits_can_be_asked_for() -> None:
    """An empty or oversized host name, and an OPEN from the gate, raise ChannelUsageError."""
    guest, gate = Streams(GUEST, egress.STREAMS), Streams(HOST, egress.STREAMS)
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
    [event] = gate.receive(taken(guest))
    assert egress.opened(event.code, event.data).host == b"x" * egress.HOST_MAX


def test_the_guest_reports_its_own_refusals() -> None:
    """The guest reports connections that it refused itself, without opening a flow."""
    guest, gate = Streams(GUEST, egress.STREAMS), Streams(HOST, egress.STREAMS)
    target = Target(UDP, b"unlisted.example", 0)
    guest.message(egress.REFUSAL, target.refusal())
    [event] = gate.receive(taken(guest))
    assert (event.type, event.stream, event.code) == (streams.MESSAGE, 0, egress.REFUSAL)
    assert egress.refused(event.data) == target
    assert not gate._open  # noqa: SLF001 - nothing was opened


@pytest.mark.parametrize(("role", "name"), [*((HOST, name) for name in TO_GATE), *((GUEST, name) for name in TO_GUEST)])
def test_a_violation_of_the_peer_is_an_error(role: streams.Role, name: str) -> None:
    """An invalid frame from the guest or from the gate ends the stream between them for good."""
    link = Streams(role, egress.STREAMS)
    if role is HOST:
        for event in link.receive(FLOWS):
            link.answer(event.stream)
        wire, good = TO_GATE[name], asking(101)
    else:
        link.open(TCP, HTTPS.opening())
        wire, good = TO_GUEST[name], frame(streams.RESET, 1)
    for data in (wire + good, good):
        with pytest.raises(PeerError):
            list(link.receive(data))


@pytest.mark.parametrize("transport", [0, TCP - 1, TCP + 1, UDP - 1, UDP + 1, 255])
def test_a_report_names_a_transport(transport: int) -> None:
    """A report about any other transport than TCP and UDP raises PeerError."""
    with pytest.raises(PeerError, match=f"transport {transport}"):
        egress.refused(Target(transport, b"x", 1).refusal())
