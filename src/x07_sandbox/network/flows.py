"""One connection of a guest as the gate carries it: far end, inspection of first bytes, windows, ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final, Protocol

from x07_sandbox.channel import egress
from x07_sandbox.network.first_bytes import InspectionError

if TYPE_CHECKING:
    from collections.abc import Callable

    from x07_sandbox.channel.egress import EgressLink
    from x07_sandbox.network.first_bytes import Inspector
    from x07_sandbox.network.summary import Contact

_LINGER: Final = struct.pack("ii", 1, 0)
_RELEASE_S: Final = 0.003
# Shared: asyncio fills it and hands it over before it asks for it again.
_BUFFER: Final = memoryview(bytearray(egress.DATA_MAX))


class Flow(ABC):
    """What all flows have.

    counters: as the ledger keeps them. touched: when something last came, in seconds. lost: the far end is closed.
    """

    def __init__(self, stream: int, contact: Contact, counters: list[int], now: float) -> None:
        self.stream = stream
        self.contact = contact
        self.counters = counters
        self.sent = self.received = 0
        self.touched = now
        self.lost = False

    def count(self, *, sent: int = 0, received: int = 0) -> None:
        """Add bytes to the account."""
        self.sent += sent
        self.received += received
        self.counters[1] += sent
        self.counters[2] += received

    @abstractmethod
    def from_guest(self, data: bytes) -> None:
        """Take bytes, or a datagram, of the program."""

    @abstractmethod
    def abort(self) -> None:
        """Close the far end at once."""


class TcpFlow(Flow, asyncio.BufferedProtocol):
    """A connection.

    held_since: when the first bytes began to be held back. half_closed_at: when one end had said all.
    """

    transport: asyncio.Transport

    def __init__(
        self,
        stream: int,
        contact: Contact,
        counters: list[int],
        link: EgressLink,
        inspector: Inspector,
        gate: Gatekeeper,
    ) -> None:
        super().__init__(stream, contact, counters, gate.now())
        self._link = link
        self._inspector = inspector
        self._gate = gate
        self._rest = b""  # of what the far end sent: beyond the guest's window
        self._unacknowledged = 0  # bytes of the guest's that the far end has not taken yet
        self._far_ended = False
        self.guest_ended = False
        self.paused = False
        self.held_since: float | None = None
        self.half_closed_at: float | None = None

    # from the guest

    def from_guest(self, data: bytes) -> None:
        """Take bytes of the program."""
        self.touched = self._gate.now()
        self._unacknowledged += len(data)
        if self._inspector.transparent:
            self._send(data)
        else:
            self._inspect(data)

    def _inspect(self, data: bytes = b"") -> None:
        """Send on what the inspection lets go of."""
        try:
            out = self._inspector.from_client(data)
        except InspectionError as exc:
            self._gate.refuse(self, exc)
            return
        if not self._inspector.held or self._inspector.decided:
            self.held_since = None
        elif self.held_since is None:
            self.held_since = self._gate.now()
            asyncio.get_running_loop().call_later(_RELEASE_S, self._release)
        self._send(out)

    def _release(self) -> None:
        """Send on what may go ahead of its judgement: the program may wait for an answer to it."""
        if not self.lost and self.held_since is not None and (out := self._inspector.release()):
            self.held_since = None
            self._send(out)
            self._gate.flush()

    def _send(self, data: bytes) -> None:
        if data:
            self.count(sent=len(data))
            self.transport.write(data)
        self._acknowledge()

    def guest_finished(self) -> None:
        """The program will send no more."""
        try:
            self._inspector.client_eof()
        except InspectionError as exc:
            self._gate.refuse(self, exc)
            return
        self._inspect()
        if self.lost or self.transport.is_closing():
            return
        self.guest_ended = True
        with contextlib.suppress(OSError):  # the far end has just reset the connection, as the loop will hear
            self.transport.write_eof()
        self._half_closed()

    def _acknowledge(self) -> None:
        if self._unacknowledged and not self.transport.get_write_buffer_size():
            self._link.consumed(self.stream, self._unacknowledged)
            self._unacknowledged = 0

    def waiting_bytes(self) -> int:
        """Bytes of this flow that the gate holds."""
        return self._unacknowledged + len(self._rest)

    # from the far end

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As asyncio.BaseProtocol has it."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - for the type checker
        self.transport = transport
        transport.set_write_buffer_limits(high=0, low=0)  # `resume_writing` tells when all has been taken

    def resume_writing(self) -> None:
        """The far end has taken what there was."""
        self._acknowledge()
        self._gate.flush()

    def get_buffer(self, _sizehint: int) -> memoryview:
        """Return room for this flow's share of what the gate reads at once."""
        return _BUFFER[: self._gate.share()]

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes came from the far end."""
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
        """The far end will send no more; the connection stays open for what the program sends."""
        self._far_ended = True
        self.pump()
        self._gate.flush()
        return True

    def pump(self) -> None:
        """Send the guest what it takes, and read on only when it has taken all."""
        if self._rest:
            self._rest = self._rest[self._link.send(self.stream, self._rest) :]
        hold = bool(self._rest) or self._gate.busy() or not self._link.window(self.stream)
        if hold != self.paused and not self.transport.is_closing():
            self.paused = hold
            (self.transport.pause_reading if hold else self.transport.resume_reading)()
        if self._far_ended and not self._rest:
            self._link.finish(self.stream)
            self._half_closed()

    def _half_closed(self) -> None:
        if self.guest_ended and self._far_ended and not self._rest:
            self.transport.close()  # it sends first what it holds
        elif self.half_closed_at is None:
            self.half_closed_at = self._gate.now()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is over."""
        self._gate.ended(self, clean=exc is None and self._far_ended and not self._rest)

    def abort(self) -> None:
        """Close the far end at once, with a reset: what the program sent may not be all."""
        if (sock := self.transport.get_extra_info("socket")) is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
        self.transport.abort()


class UdpFlow(Flow, asyncio.DatagramProtocol):
    """Datagrams between a program and one address: a connected socket, so nobody else's come."""

    transport: asyncio.DatagramTransport

    def __init__(self, stream: int, contact: Contact, counters: list[int], link: EgressLink, gate: Gatekeeper) -> None:
        super().__init__(stream, contact, counters, gate.now())
        self._link = link
        self._gate = gate
        self._full = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As asyncio.BaseProtocol has it."""
        assert isinstance(transport, asyncio.DatagramTransport)  # noqa: S101 - for the type checker
        self.transport = transport

    def from_guest(self, data: bytes) -> None:
        """Send a datagram of the program; nothing where too much waits."""
        self.touched = self._gate.now()
        if not self._full:
            self.count(sent=len(data))
            self.transport.sendto(data)

    def pause_writing(self) -> None:
        """The host's network does not take as much: more is dropped."""
        self._full = True

    def resume_writing(self) -> None:
        """It does again."""
        self._full = False

    def datagram_received(self, data: bytes, _address: object) -> None:
        """Pass a datagram on; it is dropped where the guest does not keep up."""
        self.touched = self._gate.now()
        if not self._gate.busy():
            self.count(received=len(data))
            self._link.send_datagram(self.stream, data)
            self._gate.flush()

    def error_received(self, _exc: Exception) -> None:
        """Nothing: as over a real network, a datagram may be lost."""

    def connection_lost(self, _exc: Exception | None) -> None:
        """The socket is closed."""
        self._gate.ended(self, clean=False)

    def abort(self) -> None:
        """Close the socket."""
        self.transport.abort()


class Gatekeeper(Protocol):
    """What a flow needs of its gate."""

    @property
    def now(self) -> Callable[[], float]:
        """The clock: seconds, never going back."""

    def flush(self) -> None:
        """Write to the guest what the link has queued."""

    def busy(self) -> bool:
        """Whether so much is queued for the guest that no far end is to be read."""

    def share(self) -> int:
        """How many bytes one flow may read at a time."""

    def refuse(self, flow: TcpFlow, problem: InspectionError) -> None:
        """End a flow for what its first bytes claimed."""

    def ended(self, flow: Flow, *, clean: bool) -> None:
        """Forget a flow whose far end is closed. clean: both ends had said all."""
