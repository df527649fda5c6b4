"""One connection of a guest through the gate: server socket, inspection, flow-control windows, closing."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final, Protocol

from x07_sandbox.channel import egress
from x07_sandbox.channel.streams import Streams
from x07_sandbox.network.first_bytes import Inspector
from x07_sandbox.network.protocols import InspectionError
from x07_sandbox.policy.denials import Contact

_LINGER: Final = struct.pack("ii", 1, 0)
# Shared: asyncio delivers its content before it requests the buffer again.
_BUFFER: Final = memoryview(bytearray(egress.DATA_MAX))


class Flow(ABC):
    """Base of all flows. counters: the ledger's. touched: when data last passed. lost: whether the server is gone."""

    def __init__(self, stream: int, contact: Contact, counters: list[int], now: float) -> None:
        self.stream = stream
        self.contact = contact
        self.counters = counters
        self.sent = self.received = 0
        self.touched = now
        self.lost = False

    def count(self, *, sent: int = 0, received: int = 0) -> None:
        """Add to the byte counters."""
        self.sent += sent
        self.received += received
        self.counters[1] += sent
        self.counters[2] += received

    @abstractmethod
    def from_guest(self, data: bytes) -> None:
        """Take bytes, or a datagram, from the program."""

    @abstractmethod
    def abort(self) -> None:
        """Close the server side at once."""


class TcpFlow(Flow, asyncio.BufferedProtocol):
    """A TCP connection. held_since: when bytes were first held back. half_closed_at: when one side finished sending."""

    transport: asyncio.Transport

    def __init__(
        self,
        stream: int,
        contact: Contact,
        counters: list[int],
        link: Streams,
        inspector: Inspector,
        gate: _Gatekeeper,
    ) -> None:
        super().__init__(stream, contact, counters, gate.now())
        self._link = link
        self._inspector = inspector
        self._gate = gate
        self._rest = b""  # from the server, beyond the guest's window
        self._unacknowledged = 0  # bytes from the guest that the server has not taken yet
        # What the transport gets next. It keeps each write apart and adds up their sizes at each call, so thousands of
        # small writes would occupy the gate's only thread.
        self._out = bytearray()
        self._blocked = False  # whether the transport still holds its last write
        self._server_ended = False
        self._finishing = False  # whether the program's data ends with the held bytes
        self.guest_ended = False
        self.paused = False
        self.held_since: float | None = None
        self.half_closed_at: float | None = None

    # from the guest

    def from_guest(self, data: bytes) -> None:
        """Take bytes from the program."""
        self.touched = self._gate.now()
        self._unacknowledged += len(data)
        if self._inspector.transparent:
            self._send(data)
        else:
            self._inspect(data)

    def _inspect(self, data: bytes = b"") -> None:
        """Pass *data* to the inspector, and forward the bytes that it releases."""
        try:
            out = self._inspector.from_client(data)
        except InspectionError as exc:
            self._gate.refuse(self, exc)
            return
        if not self._inspector.held or self._inspector.decided:
            self.held_since = None
        elif self.held_since is None:
            self.held_since = self._gate.now()
        self._send(out)
        if self._finishing and not self._inspector.held:
            self._finish()

    def _send(self, data: bytes) -> None:
        if data:
            self.count(sent=len(data))
            self._out += data
            self._write()
        self._acknowledge()

    def _write(self, *, all_now: bool = False) -> None:
        if self._out and (all_now or not self._blocked):
            out, self._out = bytes(self._out), bytearray()
            self.transport.write(out)

    def guest_finished(self) -> None:
        """Handle the end of the program's data."""
        try:
            self._inspector.client_eof()
        except InspectionError as exc:
            self._gate.refuse(self, exc)
            return
        self._finishing = True
        self._inspect()  # calls _finish, unless bytes are held until the server's answer

    def _finish(self) -> None:
        """End the server's input."""
        self._finishing = False
        if self.lost or self.transport.is_closing():
            return
        self.guest_ended = True
        self._write(all_now=True)
        with contextlib.suppress(OSError):  # the server has just reset the connection
            self.transport.write_eof()
        self._half_closed()

    def _acknowledge(self) -> None:
        if self._unacknowledged and not self._blocked:
            self._link.consumed(self.stream, self._unacknowledged)
            self._unacknowledged = 0

    def waiting_bytes(self) -> int:
        """Return the number of bytes that the gate buffers for this flow."""
        return self._unacknowledged + len(self._rest)

    # from the server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(high=0, low=0)  # resume_writing() is called when the buffer is empty

    def pause_writing(self) -> None:
        """Keep further bytes until the server has accepted the last write."""
        self._blocked = True

    def resume_writing(self) -> None:
        """Write what has come meanwhile, and acknowledge the bytes that the server has accepted."""
        self._blocked = False
        self._write()
        self._acknowledge()
        self._gate.flush()

    def get_buffer(self, _sizehint: int) -> memoryview:
        """Return a buffer of the size that this flow may read at a time."""
        return _BUFFER[: self._gate.share()]

    def buffer_updated(self, nbytes: int) -> None:
        """Take bytes from the server."""
        self.touched = self._gate.now()
        data = bytes(_BUFFER[:nbytes])
        if self._inspector.watches_server:
            try:
                self._inspector.from_server(data)
            except InspectionError as exc:
                self._gate.refuse(self, exc)
                return
            self._inspect()
        self.count(received=nbytes)
        self._rest += data
        self.pump()
        self._gate.flush()

    def eof_received(self) -> bool:
        """Handle the end of the server's data. The connection stays open for the program's data."""
        self._server_ended = True
        self.pump()
        self._gate.flush()
        return True

    def pump(self) -> None:
        """Send the guest as much as its window allows. Read from the server only while no received bytes are left."""
        if self._rest:
            self._rest = self._rest[self._link.send(self.stream, self._rest) :]
        hold = bool(self._rest) or self._gate.busy() or not self._link.window(self.stream)
        if hold != self.paused and not self.transport.is_closing():
            self.paused = hold
            (self.transport.pause_reading if hold else self.transport.resume_reading)()
        if self._server_ended and not self._rest:
            self._link.finish(self.stream)
            self._half_closed()

    def _half_closed(self) -> None:
        if self.guest_ended and self._server_ended and not self._rest:
            self.transport.close()  # flushes its buffer first
        elif self.half_closed_at is None:
            self.half_closed_at = self._gate.now()

    def connection_lost(self, exc: Exception | None) -> None:
        """Report the closed connection."""
        self._gate.ended(self, clean=exc is None and self._server_ended and not self._rest)

    def abort(self) -> None:
        """Reset the connection: the program's data may be incomplete."""
        if (sock := self.transport.get_extra_info("socket")) is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
        self.transport.abort()


class UdpFlow(Flow, asyncio.DatagramProtocol):
    """Datagrams between a program and one address, through a connected socket."""

    transport: asyncio.DatagramTransport

    def __init__(self, stream: int, contact: Contact, counters: list[int], link: Streams, gate: _Gatekeeper) -> None:
        super().__init__(stream, contact, counters, gate.now())
        self._link = link
        self._gate = gate
        self._full = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.DatagramTransport)
        self.transport = transport

    def from_guest(self, data: bytes) -> None:
        """Send a datagram of the program. Drop the datagram while the socket is congested."""
        self.touched = self._gate.now()
        if not self._full:
            self.count(sent=len(data))
            self.transport.sendto(data)

    def pause_writing(self) -> None:
        """Drop further datagrams."""
        self._full = True

    def resume_writing(self) -> None:
        """Send datagrams again."""
        self._full = False

    def datagram_received(self, data: bytes, _address: object) -> None:
        """Forward a datagram. Drop the datagram if the guest does not keep up."""
        self.touched = self._gate.now()
        if not self._gate.busy():
            self.count(received=len(data))
            self._link.send_datagram(self.stream, data)
            self._gate.flush()

    def error_received(self, _exc: Exception) -> None:
        """Ignore errors: datagrams may be lost."""

    def connection_lost(self, _exc: Exception | None) -> None:
        """Report the closed socket."""
        self._gate.ended(self, clean=False)

    def abort(self) -> None:
        """Close the socket."""
        self.transport.abort()


class _Gatekeeper(Protocol):
    """The operations of `gate.Gate` that a flow needs."""

    @property
    def now(self) -> Callable[[], float]: ...
    def flush(self) -> None: ...
    def busy(self) -> bool: ...
    def share(self) -> int: ...
    def refuse(self, flow: TcpFlow, problem: InspectionError) -> None: ...
    def ended(self, flow: Flow, *, clean: bool) -> None: ...
