"""The frames between the relay in the guest and the egress gate, as a state machine without I/O.

A frame is a 12-byte header, `HEADER`, and a payload:

    type     u8
    code     u8; one of the codes below in OPENED and RESET, else 0
    zero     u16
    stream   u32; chosen by the guest, in increasing order
    length   u32; of the payload

Integers are big endian. A stream carries one flow: a connection, or the datagrams between two endpoints. The guest
opens it, and the gate answers with OPENED. Each direction has a window of `WINDOW` bytes, which the reader refills with
CREDIT. Datagrams have no window and may be dropped.

With REFUSAL the guest reports a connection that it refused itself. The frame uses stream 0 and the payload of OPEN.
Port 0 stands for a name lookup.

The guest is hostile, so every length, count and order is verified.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator
from typing import Final, NamedTuple

from x07_sandbox.errors import ChannelUsageError, PeerError

HEADER: Final = struct.Struct(">BBHII")
DATA_MAX: Final = 128 * 1024
DATAGRAM_MAX: Final = 65_507  # of UDP over IPv4
WINDOW: Final = 512 * 1024
HOST_MAX: Final = 255
STREAM_MAX: Final = 2**32 - 1
TCP: Final = 6
UDP: Final = 17
DNS: Final = "127.0.0.53"  # of the relay in the guest
RESOLV_CONF: Final = f"nameserver {DNS}\noptions timeout:5 attempts:2\n"
CA_FILE: Final = "/x07/in/ca-certificates.crt"  # the user's certificates, followed by those of the image

# Frame types; the numbers are the protocol.
OPEN: Final = 1
OPENED: Final = 2
DATA: Final = 3
CREDIT: Final = 4
FIN: Final = 5
RESET: Final = 6
DATAGRAM: Final = 7
REFUSAL: Final = 8

# Codes of OPENED and RESET.
OK: Final = 0
REFUSED: Final = 1
HOST_UNREACHABLE: Final = 2
NET_UNREACHABLE: Final = 3
TIMED_OUT: Final = 4
POLICY: Final = 5
LIMIT: Final = 6
NO_NAME: Final = 7
CODE_MAX: Final = NO_NAME

_TARGET: Final = struct.Struct(">BH")  # transport, port; then the host
_CREDIT: Final = struct.Struct(">I")
# Minimum and maximum payload size, whether the guest may send it, whether the gate may.
_SHAPES: Final = {
    OPEN: (_TARGET.size + 1, _TARGET.size + HOST_MAX, True, False),
    OPENED: (0, 0, False, True),
    DATA: (1, DATA_MAX, True, True),
    CREDIT: (_CREDIT.size, _CREDIT.size, True, True),
    FIN: (0, 0, True, True),
    RESET: (0, 0, True, True),
    DATAGRAM: (0, DATAGRAM_MAX, True, True),
    REFUSAL: (_TARGET.size + 1, _TARGET.size + HOST_MAX, True, False),
}


class Event(NamedTuple):
    """A verified frame. In OPEN and REFUSAL, value is the port and data is the host; else the code and the payload."""

    kind: int
    stream: int
    value: int = 0
    data: bytes = b""
    transport: int = TCP


class _Flow:
    """A flow: the number of bytes that each direction may still send, and which directions have ended."""

    __slots__ = ("ended_in", "ended_out", "opened", "receive_window", "send_window", "transport", "unacknowledged")

    def __init__(self, transport: int) -> None:
        self.transport = transport
        self.opened = False
        self.send_window = self.receive_window = WINDOW
        self.unacknowledged = 0
        self.ended_in = self.ended_out = False


class EgressLink:
    """One side of the egress stream: the guest's relay or the gate. Not thread-safe."""

    def __init__(self, *, guest: bool) -> None:
        self.guest = guest
        self.flows: dict[int, _Flow] = {}
        self._last = 0  # highest stream number opened
        self._in = bytearray()
        self._failed = False
        self._partial = memoryview(b"")  # the rest of a partially written frame
        self._urgent = bytearray()
        self._frames: deque[bytes] = deque()
        self._bulk = 0

    # incoming

    def receive(self, data: bytes | memoryview) -> Iterator[Event]:
        """Take bytes from the peer and yield their events. Raises PeerError, and again on every later call."""
        if not self._failed:
            self._in += data
        return self._events()

    def _events(self) -> Iterator[Event]:
        if self._failed:
            raise PeerError("bad frame", "the stream has failed before")
        at = 0
        try:
            while len(self._in) - at >= HEADER.size:
                kind, code, zero, stream, length = HEADER.unpack_from(self._in, at)
                self._check_header(kind, code, zero, stream, length)
                end = at + HEADER.size + length
                if len(self._in) < end:
                    break
                with memoryview(self._in) as view:
                    payload = bytes(view[at + HEADER.size : end])
                at = end
                if (event := self._event(kind, code, stream, payload)) is not None:
                    yield event
        except PeerError:
            self._failed = True
            self._in.clear()
            raise
        finally:
            del self._in[:at]

    def _check_header(self, kind: int, code: int, zero: int, stream: int, length: int) -> None:
        """Check a header before its payload arrives, so that at most one frame is buffered. Raises PeerError."""
        shape = _SHAPES.get(kind)
        if shape is None or not (shape[3] if self.guest else shape[2]):
            raise PeerError("bad frame", f"this side may not send type {kind}")
        if zero or (stream == 0) != (kind == REFUSAL) or not shape[0] <= length <= shape[1]:
            raise PeerError("bad frame", f"type {kind} on stream {stream} with {length} bytes")
        if code > (CODE_MAX if kind in {OPENED, RESET} else 0):
            raise PeerError("bad frame", f"code {code}")

    def _event(self, kind: int, code: int, stream: int, payload: bytes) -> Event | None:
        if kind == OPEN:
            return self._open(stream, payload)
        if kind == REFUSAL:
            return _target(REFUSAL, 0, payload)
        if stream > self._last:
            raise PeerError("bad frame", f"stream {stream} was never opened")
        flow = self.flows.get(stream)
        if flow is None:  # closed here while the frame was in flight
            return None
        if kind in {OPENED, RESET}:
            return self._answer(kind, code, stream, flow)
        if not flow.opened:
            raise PeerError("bad frame", f"type {kind} before stream {stream} was opened")
        if (kind == DATAGRAM) != (flow.transport == UDP):
            raise PeerError("bad frame", f"type {kind} does not fit the transport of stream {stream}")
        if kind == CREDIT:
            return self._credit(stream, flow, _CREDIT.unpack(payload)[0])
        return Event(DATAGRAM, stream, data=payload) if kind == DATAGRAM else self._data(kind, stream, flow, payload)

    def _answer(self, kind: int, code: int, stream: int, flow: _Flow) -> Event:
        if kind == OPENED and flow.opened:
            raise PeerError("bad frame", f"stream {stream} was opened twice")
        flow.opened = kind == OPENED and code == OK
        if not flow.opened:
            del self.flows[stream]
        return Event(kind, stream, code)

    def _open(self, stream: int, payload: bytes) -> Event:
        if stream <= self._last:
            raise PeerError("bad frame", f"stream {stream} is not higher than the last one")
        event = _target(OPEN, stream, payload)
        self._last = stream
        self.flows[stream] = _Flow(event.transport)
        return event

    def _credit(self, stream: int, flow: _Flow, more: int) -> Event:
        if not more or flow.send_window + more > WINDOW:
            raise PeerError("bad frame", f"credit for stream {stream} is zero or exceeds its window")
        flow.send_window += more
        return Event(CREDIT, stream)

    def _data(self, kind: int, stream: int, flow: _Flow, payload: bytes) -> Event:
        if flow.ended_in:
            raise PeerError("bad frame", f"stream {stream} has ended")
        if kind == FIN:
            flow.ended_in = True
            self._forget_ended(stream, flow)
            return Event(FIN, stream)
        flow.receive_window -= len(payload)
        if flow.receive_window < 0:
            raise PeerError("bad frame", f"stream {stream} exceeds its window")
        return Event(DATA, stream, data=payload)

    def _forget_ended(self, stream: int, flow: _Flow) -> None:
        if flow.ended_in and flow.ended_out:
            self.flows.pop(stream, None)

    # outgoing

    def open(self, transport: int, host: bytes, port: int) -> int:
        """Request a connection from the gate. Return its stream number. Raises ChannelUsageError."""
        if not self.guest or not 0 < len(host) <= HOST_MAX or self._last == STREAM_MAX:
            raise ChannelUsageError("this flow cannot be opened here")
        self._last += 1
        self.flows[self._last] = _Flow(transport)
        self._queue(OPEN, self._last, _TARGET.pack(transport, port) + host)
        return self._last

    def report_refusal(self, transport: int, host: bytes, port: int) -> None:
        """Report a connection that was refused in the guest. Skip the report if too much is queued already."""
        if self.pending() < WINDOW and 0 < len(host) <= HOST_MAX:
            self._queue(REFUSAL, 0, _TARGET.pack(transport, port) + host)

    def opened(self, stream: int, code: int = OK) -> None:
        """Answer the guest's OPEN frame. Any *code* other than OK ends the flow."""
        if (flow := self.flows.get(stream)) is None:
            return
        flow.opened = code == OK
        if code:
            del self.flows[stream]
        self._queue(OPENED, stream, code=code)

    def window(self, stream: int) -> int:
        """Return the number of bytes that the peer accepts now; 0 for an unknown flow."""
        flow = self.flows.get(stream)
        return flow.send_window if flow is not None and flow.opened and not flow.ended_out else 0

    def send(self, stream: int, data: bytes | bytearray | memoryview) -> int:
        """Queue as much of *data* as the window allows, and return the number of queued bytes."""
        count = min(len(data), self.window(stream))
        view = memoryview(data)[:count]
        for at in range(0, count, DATA_MAX):
            self._bulk_frame(DATA, stream, view[at : at + DATA_MAX])
        if count:
            self.flows[stream].send_window -= count
        return count

    def send_datagram(self, stream: int, data: bytes) -> None:
        """Queue a datagram, unless the flow is closed or the datagram too large."""
        if len(data) <= DATAGRAM_MAX and self.window(stream):
            self._bulk_frame(DATAGRAM, stream, data)

    def finish(self, stream: int) -> None:
        """Queue the message that this side sends no more data in the flow. Idempotent."""
        if (flow := self.flows.get(stream)) is None or flow.ended_out:
            return
        flow.ended_out = True
        self._bulk_frame(FIN, stream, b"")
        self._forget_ended(stream, flow)

    def reset(self, stream: int, code: int = OK) -> None:
        """Abort a flow. Idempotent."""
        if self.flows.pop(stream, None) is not None:
            self._queue(RESET, stream, code=code)

    def consumed(self, stream: int, count: int) -> None:
        """Record that *count* bytes were processed. The peer gets new credit in steps of half a window."""
        if (flow := self.flows.get(stream)) is None or flow.ended_in:
            return
        flow.unacknowledged += count
        if flow.unacknowledged >= WINDOW // 2:
            self._queue(CREDIT, stream, _CREDIT.pack(flow.unacknowledged))
            flow.receive_window += flow.unacknowledged
            flow.unacknowledged = 0

    def _queue(self, kind: int, stream: int, payload: bytes = b"", code: int = 0) -> None:
        self._urgent += HEADER.pack(kind, code, 0, stream, len(payload)) + payload

    def _bulk_frame(self, kind: int, stream: int, payload: bytes | memoryview) -> None:
        frame = HEADER.pack(kind, 0, 0, stream, len(payload)) + payload
        self._frames.append(frame)
        self._bulk += len(frame)

    def pending(self) -> int:
        """Number of queued bytes."""
        return len(self._partial) + len(self._urgent) + self._bulk

    def data_to_send(self) -> memoryview:
        """Return the next bytes to write: the rest of a started frame, or control frames, or one data frame."""
        if not self._partial:
            if self._urgent:
                self._partial = memoryview(bytes(self._urgent))
                self._urgent.clear()
            elif self._frames:
                self._partial = memoryview(self._frames.popleft())
                self._bulk -= len(self._partial)
        return self._partial

    def sent(self, count: int) -> None:
        """Drop *count* written bytes of `data_to_send`."""
        self._partial = self._partial[count:]


def _target(kind: int, stream: int, payload: bytes) -> Event:
    """Decode the payload of OPEN or REFUSAL. Raises PeerError."""
    transport, port = _TARGET.unpack_from(payload)
    if transport not in {TCP, UDP}:
        raise PeerError("bad frame", f"transport {transport}")
    return Event(kind, stream, port, payload[_TARGET.size :], transport)
