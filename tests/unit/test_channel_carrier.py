"""Tests of the bytes of a descriptor on a stream of the channel."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Iterator

import pytest

from x07_sandbox.channel.connection import Carrier
from x07_sandbox.channel.link import STREAMS, WINDOW, Stream
from x07_sandbox.channel.streams import DATA, FIN, OPEN, Role, Streams

SUBJECT = bytes(4)
LARGE = bytes(range(256)) * 8192  # several windows


class End:
    """One end: the channel's streams, the carrier, and the far end of its descriptor."""

    def __init__(self, role: Role) -> None:
        self.channel = Streams(role, STREAMS)
        ours, self.far = socket.socketpair()
        os.set_blocking(self.far.fileno(), False)
        self.ours = ours
        self.carrier: Carrier | None = None
        self.most_pending = 0

    def carry(self, number: int) -> None:
        """Begin to carry bytes on a stream."""
        self.carrier = Carrier(self.channel, number, self.ours.fileno())

    def turn(self, other: End) -> None:
        """Let the carrier do what its descriptor is ready for, then pass on all frames to the *other* end."""
        if self.carrier is not None:
            poll = select.poll()
            self.carrier.register(poll)
            for _, mask in poll.poll(0):
                self.carrier.handle(mask)
        self.most_pending = max(self.most_pending, self.channel.pending())
        while self.channel.pending():
            data = bytes(self.channel.data_to_send())
            self.channel.sent(len(data))
            for event in other.channel.receive(data):
                if event.type == OPEN:
                    other.carry(event.stream)
                elif other.carrier is not None:
                    other.carrier.take(event)


@pytest.fixture
def ends() -> Iterator[tuple[End, End]]:
    """Yield host and guest, which has opened the stream."""
    host, guest = End(Role.HOST), End(Role.GUEST)
    guest.carry(guest.channel.open(Stream.RELAY, SUBJECT))
    guest.turn(host)
    yield host, guest
    for end in (host, guest):
        end.ours.close()
        end.far.close()


def taken(end: End) -> bytes:
    """Return what can be read now from the far end of a descriptor."""
    try:
        return end.far.recv(1 << 20)
    except BlockingIOError:
        return b""


@pytest.mark.parametrize("sender", Role)
def test_bytes_arrive_in_order_and_a_slow_reader_holds_up_the_sender(ends: tuple[End, End], sender: Role) -> None:
    """The bytes of a descriptor arrive in order; while nobody reads them, at most a window and one read wait."""
    host, guest = ends
    by, to = (host, guest) if sender is Role.HOST else (guest, host)
    left, got = LARGE, b""
    for turn in range(2000):
        with contextlib.suppress(BlockingIOError):
            left = left[by.far.send(left) :] if left else left
        by.turn(to)
        to.turn(by)
        if turn >= 100:  # the reader is slow at first
            got += taken(to)
        if len(got) == len(LARGE):
            break
    assert got == LARGE
    assert by.most_pending <= WINDOW + (WINDOW // (32 << 10)) * 12


def test_a_descriptor_at_its_end_ends_its_direction_only(ends: tuple[End, End]) -> None:
    """When the relay's descriptor ends, its direction of the stream ends, and the other one goes on."""
    host, guest = ends
    guest.far.shutdown(socket.SHUT_WR)
    guest.turn(host)
    guest.turn(host)
    assert host.carrier is not None
    assert host.channel.is_open(host.carrier.number)
    os.write(host.far.fileno(), b"more")
    host.turn(guest)
    guest.turn(host)
    assert taken(guest) == b"more"


def test_bytes_for_a_closed_descriptor_are_dropped(ends: tuple[End, End]) -> None:
    """Once the gate has closed its end, further bytes are dropped, and the sender gets its credit back."""
    host, guest = ends
    host.far.close()
    for _ in range(40):
        guest.far.send(bytes(32 << 10))
        guest.turn(host)
        host.turn(guest)
    assert guest.carrier is not None
    assert guest.channel.window(guest.carrier.number) > 0


def test_frames_of_the_stream_have_no_other_type(ends: tuple[End, End]) -> None:
    """The carried bytes are DATA, and FIN at the end."""
    host, guest = ends
    guest.far.send(b"x")
    guest.far.shutdown(socket.SHUT_WR)
    assert guest.carrier is not None
    guest.carrier.handle(select.POLLIN)
    data = bytes(guest.channel.data_to_send())
    assert [event.type for event in host.channel.receive(data)] == [DATA, FIN]
