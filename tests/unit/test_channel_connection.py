"""A link over a real descriptor: partial reads and writes, and a closed peer."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from tests.guest.messages import MESSAGES, same, steps_to
from x07_sandbox.channel import streams
from x07_sandbox.channel.connection import Connection
from x07_sandbox.channel.link import DATA_MAX, WINDOW, CommandState, State, Stream
from x07_sandbox.channel.messages import FORMS, Hello, Message, Seed, Stop
from x07_sandbox.channel.streams import Event, Role
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


def read_some(connection: Connection) -> list[Message | Event]:
    """Return the messages and events that have arrived."""
    events = connection.read()
    assert events is not None
    return list(events)


def running(one: socket.socket, other: socket.socket) -> tuple[Connection, Connection]:
    """Return host and guest connections with a running command."""
    host, guest = Connection(one.fileno(), Role.HOST), Connection(other.fileno(), Role.GUEST)
    for step in steps_to(State.OPEN, CommandState.RUNNING):
        sender, receiver = (host, guest) if FORMS[type(step)].sender is Role.HOST else (guest, host)
        sender.link.send(step)
        assert sender.flush()
        assert same(read_some(receiver), [step])
    assert host.link.state is guest.link.state is State.OPEN
    return host, guest


def with_output(host: Connection, guest: Connection) -> int:
    """Open the command's output. Return the number of the stream."""
    number = guest.link.open(Stream.STDOUT, 1)
    assert guest.flush()
    assert len(read_some(host)) == 1
    return number


def test_bytes_a_full_descriptor_rejects_stay_queued(sockets: tuple[socket.socket, socket.socket]) -> None:
    """Bytes that a full descriptor does not accept stay queued and arrive once the peer reads."""
    host, guest = running(*sockets)
    sent = os.urandom(WINDOW)
    assert host.link.streams.send(host.link.open(Stream.STDIN, 1), sent) == WINDOW
    came = bytearray()
    turns = 0
    assert host.flush()
    assert host.link.pending() > 0, "the socket took everything at once: nothing is tested"
    while len(came) < WINDOW:
        assert host.flush()
        for event in read_some(guest):
            assert isinstance(event, Event)
            assert len(event.data) <= DATA_MAX
            came += event.data if event.type == streams.DATA else b""
        turns += 1
    assert came == sent
    assert turns > 1


def test_frames_are_read_byte_by_byte(sockets: tuple[socket.socket, socket.socket]) -> None:
    """A frame that arrives one byte at a time is decoded, and an incomplete one is no event."""
    host, guest = running(*sockets)
    number = with_output(host, guest)
    guest.link.streams.send(number, b"slow")
    wire = guest.link.streams.data_to_send()
    for at in range(len(wire) - 1):
        sockets[1].send(wire[at : at + 1])
        assert read_some(host) == []
    sockets[1].send(wire[-1:])
    assert read_some(host) == [Event(streams.DATA, number, Stream.STDOUT, b"slow")]


def test_data_before_a_close_is_read(sockets: tuple[socket.socket, socket.socket]) -> None:
    """Data sent before the peer closed is read first; later reads report the end."""
    host, guest = running(*sockets)
    number = with_output(host, guest)
    guest.link.streams.send(number, b"last words")
    assert guest.flush()
    sockets[1].close()
    assert read_some(host) == [Event(streams.DATA, number, Stream.STDOUT, b"last words")]
    assert host.read() is None
    assert host.read() is None


def test_writing_to_a_closed_peer_returns_false(sockets: tuple[socket.socket, socket.socket]) -> None:
    """Writing to a closed peer returns false instead of raising."""
    host, _ = running(*sockets)
    sockets[1].close()
    host.link.send(Stop(1, 9))
    assert not host.flush()
    assert host.link.pending() > 0


def test_a_reset_connection_reads_as_closed(sockets: tuple[socket.socket, socket.socket]) -> None:
    """A reset connection reads as closed."""
    host, _ = running(*sockets)
    host.link.send(Stop(1, 9))
    assert host.flush()
    sockets[1].close()
    assert host.read() is None


def test_junk_is_a_peer_error(sockets: tuple[socket.socket, socket.socket]) -> None:
    """Junk raises PeerError after the valid frames before it."""
    host, guest = running(*sockets)
    number = with_output(host, guest)
    guest.link.streams.send(number, b"!")
    sockets[1].send(bytes(guest.link.streams.data_to_send()) + b"\xff" * 100)
    events = host.read()
    assert events is not None
    seen = iter(events)
    assert next(seen) == Event(streams.DATA, number, Stream.STDOUT, b"!")
    with pytest.raises(PeerError):
        next(seen)


def test_a_pipe_serves_as_well() -> None:
    """A connection works over a pipe for each direction."""
    to_host, to_guest = os.pipe(), os.pipe()
    try:
        guest = Connection(to_guest[0], Role.GUEST, out_fd=to_host[1])
        host = Connection(to_host[0], Role.HOST, out_fd=to_guest[1])
        guest.link.send(MESSAGES[Hello])
        assert guest.flush()
        assert same(read_some(host), [MESSAGES[Hello]])
        host.link.send(MESSAGES[Seed])
        assert host.flush()
        assert same(read_some(guest), [MESSAGES[Seed]])
    finally:
        for fd in (*to_host, *to_guest):
            os.close(fd)
