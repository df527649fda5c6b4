"""Messages and streams over one byte stream, as a state machine without I/O that both ends share.

A frame is a 12-byte header, `HEADER`, and a payload:

    type     u8
    code     u8; the number of a message, the kind of a stream that is opened, or the reason in ANSWER and RESET; else 0
    zero     u16
    stream   u32; 0 for a message
    length   u32; of the payload

Integers are big endian. A `Table` lists the messages and the kinds of streams, who may send or open each, and their
bounds. The host opens streams with even numbers and the guest with odd ones, each number higher than the one before.
Each direction of a stream has a window, which the receiver refills with CREDIT. Datagrams have no window and may be
dropped.

The guest is hostile, so the lengths, the count and the order of frames are verified.
"""

from __future__ import annotations

import enum
import struct
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from x07_sandbox.errors import ChannelUsageError, PeerError

HEADER: Final = struct.Struct(">BBHII")
STREAM_MAX: Final = 2**32 - 1
_CREDIT: Final = struct.Struct(">I")
_WRITE: Final = 64 * 1024  # small frames are joined up to this size for one write

# Frame types; the numbers are the protocol.
MESSAGE: Final = 1
OPEN: Final = 2
ANSWER: Final = 3  # to OPEN, for the kinds that need one; any code but 0 ends the stream
DATA: Final = 4
CREDIT: Final = 5
FIN: Final = 6
RESET: Final = 7
DATAGRAM: Final = 8


class Role(enum.Enum):
    """The two ends of the byte stream."""

    HOST = "host"
    GUEST = "guest"


class Message(NamedTuple):
    """The sender of a message, and the bounds of its payload in bytes."""

    sender: Role
    least: int
    most: int


class Kind(NamedTuple):
    """A kind of stream.

    opener: who opens it. sender: who sends data; None for both. least, most: bounds of OPEN's payload in bytes.
    at_once: how many may be open at the same time. answered: whether data must wait for an ANSWER. datagrams: whether
    it carries datagrams instead of bytes.
    """

    opener: Role
    sender: Role | None
    least: int
    most: int
    at_once: int
    answered: bool = False
    datagrams: bool = False


class Table(NamedTuple):
    """The messages by number, the streams by kind, and the bounds of frames, windows and answers."""

    messages: Mapping[int, Message]
    streams: Mapping[int, Kind]
    data_max: int
    window: int
    datagram_max: int = 0
    code_max: int = 0


class Event(NamedTuple):
    """A verified frame. code: the message's number, the stream's kind or the answer."""

    type: int
    stream: int
    code: int = 0
    data: bytes = b""


class _Stream:
    """An open stream: what each direction may still send, and which directions have ended."""

    __slots__ = ("code", "ended_in", "ended_out", "kind", "opened", "receive_window", "send_window", "unacknowledged")

    def __init__(self, code: int, kind: Kind, role: Role, window: int) -> None:
        self.code = code
        self.kind = kind
        self.opened = not kind.answered
        self.send_window = self.receive_window = window
        self.unacknowledged = 0
        self.ended_in = kind.sender is role
        self.ended_out = kind.sender not in {None, role}


class Streams:
    """One end of the byte stream. Not thread-safe."""

    def __init__(self, role: Role, table: Table) -> None:
        self.role = role
        self._peer = Role.GUEST if role is Role.HOST else Role.HOST
        self._table = table
        self._fixed_bounds = {  # by type, for the types whose bounds do not depend on the code
            ANSWER: (0, 0, table.code_max),
            DATA: (1, table.data_max, 0),
            CREDIT: (_CREDIT.size, _CREDIT.size, 0),
            FIN: (0, 0, 0),
            RESET: (0, 0, table.code_max),
            DATAGRAM: (0, table.datagram_max, 0),
        }
        self.restart()
        self._in = bytearray()
        self._failed = False
        self._partial = memoryview(b"")  # the rest of a partially written block
        self._urgent = bytearray()
        self._frames: deque[bytes] = deque()
        self._queued = 0  # bytes in _frames

    def restart(self) -> None:
        """Forget all streams, so that numbers start again. Both ends must do it at the same message."""
        self._open: dict[int, _Stream] = {}
        self._counts: dict[int, int] = {}  # of open streams, by kind
        # The highest numbers used: by this side, and by the other.
        self._last_own = 0 if self.role is Role.HOST else -1
        self._last_peer = -1 if self.role is Role.HOST else 0

    def preface(self, data: bytes) -> None:
        """Queue bytes that precede all frames."""
        self._partial = memoryview(data)

    # incoming

    def receive(self, data: bytes | memoryview) -> Iterator[Event]:
        """Take bytes from the peer and yield their events. Raises PeerError, and again on every later call."""
        if not self._failed:
            self._in += data
        return self._events()

    def _events(self) -> Iterator[Event]:
        if self._failed:
            raise _bad("the byte stream has failed before")
        try:
            while len(self._in) >= HEADER.size:
                kind, code, zero, stream, length = HEADER.unpack_from(self._in)
                self._check_header(kind, code, zero, stream, length)
                end = HEADER.size + length
                if len(self._in) < end:
                    break
                with memoryview(self._in) as view:
                    payload = bytes(view[HEADER.size : end])
                del self._in[:end]  # moves no bytes: a bytearray remembers where it begins
                if (event := self._event(kind, code, stream, payload)) is not None:
                    yield event
        except PeerError:
            self.fail()
            raise

    def fail(self) -> None:
        """Accept nothing more from the peer, which has violated the protocol."""
        self._failed = True
        self._in.clear()

    def _check_header(self, kind: int, code: int, zero: int, stream: int, length: int) -> None:
        """Check a header before its payload arrives, so that at most one frame is buffered. Raises PeerError."""
        least, most, codes = self._bounds(kind, code)
        if zero or code > codes or not least <= length <= most or (stream == 0) != (kind == MESSAGE):
            raise _bad(f"type {kind} and code {code} on stream {stream} with {length} bytes")

    def _bounds(self, kind: int, code: int) -> tuple[int, int, int]:
        """Return the least and the largest size of a payload, and the highest code. Raises PeerError."""
        table = self._table
        if kind == MESSAGE:
            message = table.messages.get(code)
            if message is None or message.sender is not self._peer:
                raise _bad(f"the {self._peer.value} may not send message {code}")
            return message.least, message.most, code
        if kind == OPEN:
            opened = table.streams.get(code)
            if opened is None or opened.opener is not self._peer:
                raise _bad(f"the {self._peer.value} may not open a stream of kind {code}")
            return opened.least, opened.most, code
        if kind not in self._fixed_bounds:
            raise _bad(f"type {kind} does not exist")
        return self._fixed_bounds[kind]

    def _event(self, kind: int, code: int, number: int, payload: bytes) -> Event | None:
        if kind == MESSAGE:
            return Event(MESSAGE, 0, code, payload)
        if kind == OPEN:
            return self._opened_by_peer(number, code, payload)
        own = self._is_own(number)
        if number > (self._last_own if own else self._last_peer):
            raise _bad(f"stream {number} was never opened")
        stream = self._open.get(number)
        if stream is None:  # closed here while the frame was in flight
            return None
        if kind in {ANSWER, RESET}:
            if kind == ANSWER and (stream.opened or not own):
                raise _bad(f"stream {number} expects no answer")
            stream.opened = kind == ANSWER and code == 0
            if not stream.opened:
                self.forget(number)
            return Event(kind, number, code)
        if not stream.opened:
            raise _bad(f"type {kind} before stream {number} was answered")
        if kind == CREDIT:
            return self._credit(number, stream, _CREDIT.unpack(payload)[0])
        return self._data(kind, number, stream, payload)

    def _data(self, kind: int, number: int, stream: _Stream, payload: bytes) -> Event:
        if stream.ended_in or (kind != FIN and (kind == DATAGRAM) != stream.kind.datagrams):
            raise _bad(f"type {kind} on stream {number}, which has ended or is of another kind")
        if kind == FIN:
            stream.ended_in = True
            self._forget_if_ended(number, stream)
        elif kind == DATA:
            stream.receive_window -= len(payload)
            if stream.receive_window < 0:
                raise _bad(f"stream {number} exceeds its window")
        return Event(kind, number, stream.code, payload)

    def _opened_by_peer(self, number: int, code: int, payload: bytes) -> Event:
        if number % 2 != self._last_peer % 2 or number <= self._last_peer:
            raise _bad(f"stream {number} does not have the {self._peer.value}'s next number")
        if self._counts.get(code, 0) >= self._table.streams[code].at_once:
            raise _bad(f"too many streams of kind {code} are open")
        self._last_peer = number
        self._add(number, code)
        return Event(OPEN, number, code, payload)

    def _credit(self, number: int, stream: _Stream, more: int) -> Event:
        if not more or stream.send_window + more > self._table.window:
            raise _bad(f"credit for stream {number} is zero or exceeds its window")
        stream.send_window += more
        return Event(CREDIT, number, stream.code)

    # streams

    def _add(self, number: int, code: int) -> None:
        self._open[number] = _Stream(code, self._table.streams[code], self.role, self._table.window)
        self._counts[code] = self._counts.get(code, 0) + 1

    def forget(self, number: int) -> None:
        """Close a stream without a frame, because the peer knows already that it has ended. Idempotent."""
        if (stream := self._open.pop(number, None)) is not None:
            self._counts[stream.code] -= 1

    def _forget_if_ended(self, number: int, stream: _Stream) -> None:
        if stream.ended_in and stream.ended_out:
            self.forget(number)

    def _is_own(self, number: int) -> bool:
        return number % 2 == self._last_own % 2

    def is_open(self, number: int) -> bool:
        """Return whether a stream exists and has not ended in both directions."""
        return number in self._open

    # outgoing

    def message(self, code: int, payload: bytes = b"") -> None:
        """Queue a message. Raises ChannelUsageError."""
        message = self._table.messages[code]
        if message.sender is not self.role or not message.least <= len(payload) <= message.most:
            raise ChannelUsageError(f"the {self.role.value} cannot send message {code} with {len(payload)} bytes")
        self._queue(MESSAGE, 0, payload, code)

    def open(self, code: int, payload: bytes = b"") -> int:
        """Open a stream of kind *code*, and return its number. Raises ChannelUsageError."""
        kind = self._table.streams[code]
        fits = kind.least <= len(payload) <= kind.most and self._counts.get(code, 0) < kind.at_once
        if kind.opener is not self.role or not fits or self._last_own + 2 > STREAM_MAX:
            raise ChannelUsageError(f"the {self.role.value} cannot open a stream of kind {code} now")
        self._last_own += 2
        self._add(self._last_own, code)
        self._queue(OPEN, self._last_own, payload, code)
        return self._last_own

    def answer(self, number: int, code: int = 0) -> None:
        """Answer the peer's OPEN, unless the peer has closed the stream. Any *code* other than 0 ends the stream.

        Raises ChannelUsageError if the stream expects no answer.
        """
        if (stream := self._open.get(number)) is None:
            return
        if stream.opened or self._is_own(number):
            raise ChannelUsageError(f"stream {number} expects no answer")
        stream.opened = code == 0
        if code:
            self.forget(number)
        self._queue_first(ANSWER, number, b"", code)

    def window(self, number: int) -> int:
        """Return the number of bytes that the peer accepts now; 0 for a stream that takes none."""
        stream = self._sending(number, datagrams=False)
        return 0 if stream is None else stream.send_window

    def _sending(self, number: int, *, datagrams: bool) -> _Stream | None:
        """Return a stream on which this side may send bytes or datagrams now, or None."""
        stream = self._open.get(number)
        if stream is None or not stream.opened or stream.ended_out or stream.kind.datagrams is not datagrams:
            return None
        return stream

    def send(self, number: int, data: bytes | bytearray | memoryview) -> int:
        """Queue as much of *data* as the window allows, and return the number of queued bytes."""
        count = min(len(data), self.window(number))
        view = memoryview(data)[:count]
        for at in range(0, count, self._table.data_max):
            self._queue(DATA, number, view[at : at + self._table.data_max])
        if count:
            self._open[number].send_window -= count
        return count

    def send_datagram(self, number: int, data: bytes) -> None:
        """Queue a datagram, unless the stream takes none or the datagram is too large."""
        if self._sending(number, datagrams=True) is not None and len(data) <= self._table.datagram_max:
            self._queue(DATAGRAM, number, data)

    def finish(self, number: int) -> None:
        """Queue the end of this side's data. Idempotent. Raises ChannelUsageError before the stream is answered."""
        if (stream := self._open.get(number)) is None or stream.ended_out:
            return
        if not stream.opened:
            raise ChannelUsageError(f"stream {number} was not answered")
        stream.ended_out = True
        self._queue(FIN, number)
        self._forget_if_ended(number, stream)

    def reset(self, number: int, code: int = 0) -> None:
        """Abort a stream. Idempotent."""
        if number in self._open:
            self.forget(number)
            # Our own OPEN may still be queued.
            (self._queue if self._is_own(number) else self._queue_first)(RESET, number, b"", code)

    def consumed(self, number: int, count: int) -> None:
        """Record that *count* bytes were processed. The peer gets new credit in steps of a quarter window."""
        if (stream := self._open.get(number)) is None or stream.ended_in:
            return
        if not 0 <= count <= self._table.window - stream.receive_window - stream.unacknowledged:
            raise ChannelUsageError(f"{count} bytes of stream {number} were never received")
        stream.unacknowledged += count
        if stream.unacknowledged >= self._table.window // 4:
            self._queue_first(CREDIT, number, _CREDIT.pack(stream.unacknowledged))
            stream.receive_window += stream.unacknowledged
            stream.unacknowledged = 0

    def _queue(self, kind: int, number: int, payload: bytes | memoryview = b"", code: int = 0) -> None:
        frame = HEADER.pack(kind, code, 0, number, len(payload)) + payload
        self._frames.append(frame)
        self._queued += len(frame)

    def _queue_first(self, kind: int, number: int, payload: bytes = b"", code: int = 0) -> None:
        """Queue a frame that may overtake others: the peer knows the stream already, and the order does not matter."""
        self._urgent += HEADER.pack(kind, code, 0, number, len(payload)) + payload

    def pending(self) -> int:
        """Number of queued bytes."""
        return len(self._partial) + len(self._urgent) + self._queued

    def data_to_send(self) -> memoryview:
        """Return the next bytes to write: the rest of a started block, or urgent frames, or the next frames."""
        if not self._partial:
            if self._urgent:
                self._partial = memoryview(bytes(self._urgent))
                self._urgent.clear()
            elif self._frames:
                self._partial = memoryview(self._next_block())
        return self._partial

    def _next_block(self) -> bytes:
        frames = [self._frames.popleft()]
        size = len(frames[0])
        while self._frames and size + len(self._frames[0]) <= _WRITE:
            frames.append(self._frames.popleft())
            size += len(frames[-1])
        self._queued -= size
        return frames[0] if len(frames) == 1 else b"".join(frames)

    def sent(self, count: int) -> None:
        """Drop *count* written bytes of `data_to_send`."""
        self._partial = self._partial[count:]


def _bad(why: str) -> PeerError:
    return PeerError("bad frame", why)
