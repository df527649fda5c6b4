"""A link over a real descriptor: partial reads and writes, and a closed peer."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from tests.fuzz.fuzz_channel import NONCE, SEED, START
from x07_sandbox.channel.connection import Connection
from x07_sandbox.channel.frames import DATA_MAX, WINDOW, Kind, Role, Stream
from x07_sandbox.channel.link import Control, Data, Event, State
from x07_sandbox.errors import PeerError

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected sockets; the first has the smallest send buffer."""
    near, far = socket.socketpair()
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    with near, far:
        yield near, far


def read_some(connection: Connection) -> list[Event]:
    """Return the events that have arrived."""
    events = connection.read()
    assert events is not None
    return list(events)


def running(one: socket.socket, other: socket.socket) -> tuple[Connection, Connection]:
    """Return host and guest connections in the running state."""
    host, guest = Connection(one.fileno(), Role.HOST), Connection(other.fileno(), Role.GUEST)
    steps: list[tuple[Connection, Connection, Kind, dict[str, object]]] = [
        (guest, host, Kind.HELLO, {"protocol": 1}),
        (host, guest, Kind.SEED, SEED),
        (guest, host, Kind.SEEDED, {"nonce": NONCE}),
        (host, guest, Kind.START, START),
        (guest, host, Kind.STARTED, {}),
    ]
    for sender, receiver, kind, body in steps:
        sender.link.send(kind, body)
        assert sender.flush()
        assert read_some(receiver) == [Control(kind, body)]
    assert host.link.state is guest.link.state is State.RUNNING
    return host, guest


def test_bytes_a_full_descriptor_rejects_stay_queued(sockets: tuple[socket.socket, socket.socket]) -> None:
    """Bytes that a full descriptor does not accept stay queued and arrive once the peer reads."""
    host, guest = running(*sockets)
    sent = os.urandom(WINDOW)
    assert host.link.send_data(Stream.STDIN, sent) == WINDOW
    came = bytearray()
    turns = 0
    assert host.flush()
    assert host.link.pending() > 0, "the socket took everything at once: nothing is tested"
    while len(came) < WINDOW:
        assert host.flush()
        events = read_some(guest)
        assert all(isinstance(event, Data) and len(event.payload) <= DATA_MAX for event in events)
        came += b"".join(event.payload for event in events if isinstance(event, Data))
        turns += 1
    assert came == sent
    assert turns > 1


def test_frames_are_read_byte_by_byte(sockets: tuple[socket.socket, socket.socket]) -> None:
    """A frame that arrives one byte at a time is decoded, and an incomplete one is no event."""
    host, guest = running(*sockets)
    guest.link.send_data(Stream.STDOUT, b"slow")
    wire = guest.link.data_to_send(100)
    for at in range(len(wire) - 1):
        sockets[1].send(wire[at : at + 1])
        assert read_some(host) == []
    sockets[1].send(wire[-1:])
    assert read_some(host) == [Data(Stream.STDOUT, b"slow")]


def test_data_before_a_close_is_read(sockets: tuple[socket.socket, socket.socket]) -> None:
    """Data sent before the peer closed is read first; later reads report the end."""
    host, guest = running(*sockets)
    guest.link.send_data(Stream.STDOUT, b"last words")
    assert guest.flush()
    sockets[1].close()
    assert read_some(host) == [Data(Stream.STDOUT, b"last words")]
    assert host.read() is None
    assert host.read() is None


def test_writing_to_a_closed_peer_returns_false(sockets: tuple[socket.socket, socket.socket]) -> None:
    """Writing to a closed peer returns false instead of raising."""
    host, _ = running(*sockets)
    sockets[1].close()
    host.link.send(Kind.STOP, {})
    assert not host.flush()
    assert host.link.pending() > 0


def test_a_reset_connection_reads_as_closed(sockets: tuple[socket.socket, socket.socket]) -> None:
    """A reset connection reads as closed."""
    host, _ = running(*sockets)
    host.link.send(Kind.STOP, {})
    assert host.flush()
    sockets[1].close()
    assert host.read() is None


def test_junk_is_a_peer_error(sockets: tuple[socket.socket, socket.socket]) -> None:
    """Junk raises PeerError after the valid frames before it."""
    host, guest = running(*sockets)
    guest.link.send_data(Stream.STDERR, b"!")
    sockets[1].send(guest.link.data_to_send(100) + b"\xff" * 100)
    events = host.read()
    assert events is not None
    seen = iter(events)
    assert next(seen) == Data(Stream.STDERR, b"!")
    with pytest.raises(PeerError):
        next(seen)


def test_a_pipe_serves_as_well() -> None:
    """A connection works over a plain pipe."""
    read_end, write_end = os.pipe()
    try:
        guest = Connection(write_end, Role.GUEST)
        host = Connection(read_end, Role.HOST)
        guest.link.send(Kind.HELLO, {"protocol": 1})
        assert guest.flush()
        assert read_some(host) == [Control(Kind.HELLO, {"protocol": 1})]
    finally:
        os.close(write_end)
        os.close(read_end)
