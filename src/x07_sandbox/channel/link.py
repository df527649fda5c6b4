"""The channel as a state machine without I/O, which host and guest share.

`NEXT` is the protocol: the state after each control frame. `DATA_STATES` lists the states in which data may flow.
Anything else raises PeerError (the peer's fault) or ChannelUsageError (this side's fault).
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from x07_sandbox.channel.frames import (
    DATA_MAX,
    SENDER,
    WINDOW,
    Frame,
    Kind,
    Role,
    Stream,
    decode_body,
    encode,
    encode_body,
    stream_sender,
    take_frame,
)
from x07_sandbox.errors import ChannelUsageError, PeerError

_CREDIT: Final = struct.Struct(">I")


class State(enum.Enum):
    """The state of the channel."""

    WAITING = "waiting"  # for HELLO
    GREETED = "greeted"
    WARMING = "warming"
    WARM = "warm"  # the snapshot is taken here; every clone starts here
    SEEDING = "seeding"
    READY = "ready"
    PREPARING = "preparing"
    RUNNING = "running"
    COLLECTING = "collecting"  # the program has ended; its files may follow
    FAILED = "failed"


NEXT: Final[dict[tuple[State, Kind], State]] = {
    (State.WAITING, Kind.HELLO): State.GREETED,
    (State.GREETED, Kind.SEED): State.SEEDING,
    (State.GREETED, Kind.WARM): State.WARMING,
    (State.WARMING, Kind.WARMED): State.WARM,
    (State.WARMING, Kind.FAILED): State.FAILED,
    (State.WARM, Kind.SEED): State.SEEDING,
    (State.SEEDING, Kind.SEEDED): State.READY,
    (State.SEEDING, Kind.FAILED): State.FAILED,
    (State.READY, Kind.START): State.PREPARING,
    (State.PREPARING, Kind.STARTED): State.RUNNING,
    (State.PREPARING, Kind.FAILED): State.FAILED,
    (State.RUNNING, Kind.FAILED): State.FAILED,
    (State.RUNNING, Kind.STOP): State.RUNNING,
    (State.RUNNING, Kind.DENIED): State.RUNNING,
    (State.RUNNING, Kind.EXITED): State.COLLECTING,
    (State.COLLECTING, Kind.FAILED): State.FAILED,
    # After a warm-up program of the host's own.
    (State.COLLECTING, Kind.WARM): State.WARMING,
    # STOP may cross the frame that reports the end.
    (State.PREPARING, Kind.STOP): State.PREPARING,
    (State.COLLECTING, Kind.STOP): State.COLLECTING,
    (State.FAILED, Kind.STOP): State.FAILED,
}

_FROM_START: Final = frozenset({State.PREPARING, State.RUNNING, State.COLLECTING, State.FAILED})
DATA_STATES: Final[dict[int, frozenset[State]]] = {
    Stream.STDIN: _FROM_START,  # may cross EXITED
    Stream.STDOUT: frozenset({State.RUNNING}),
    Stream.STDERR: frozenset({State.RUNNING}),
    Stream.OUTPUT_FILE: frozenset({State.COLLECTING}),
    Stream.CHANGES: frozenset({State.COLLECTING}),
    Stream.LEFT_FILES: frozenset({State.COLLECTING}),
    Stream.FIRST_FILE: _FROM_START,  # and all other input files
}


class Control(NamedTuple):
    """Event: a control frame arrived."""

    kind: Kind
    body: dict[str, Any]


class Data(NamedTuple):
    """Event: bytes of a stream arrived; call `Link.consumed` once they are processed."""

    stream: int
    payload: bytes


class Eof(NamedTuple):
    """Event: a stream ended."""

    stream: int


class Credit(NamedTuple):
    """Event: the peer accepts more bytes of a stream."""

    stream: int


Event = Control | Data | Eof | Credit


class Link:
    """One end of the channel; not thread-safe. If the VM is a clone of a saved VM, *state* is WARM at first."""

    def __init__(self, role: Role, state: State = State.WAITING) -> None:
        self.role = role
        self.peer = Role.GUEST if role is Role.HOST else Role.HOST
        self.state = state
        self._in = bytearray()
        self._error: PeerError | None = None
        self._out = bytearray()
        self._send_window: dict[int, int] = {}  # bytes left, by stream
        self._receive_window: dict[int, int] = {}
        self._unacknowledged: dict[int, int] = {}
        self._ended_out: set[int] = set()
        self._ended_in: set[int] = set()

    def _reset_streams(self) -> None:
        """Reset the streams for a new job. No data of the previous job is in flight."""
        windows = self._send_window, self._receive_window, self._unacknowledged
        for collection in (*windows, self._ended_out, self._ended_in):
            collection.clear()

    # incoming

    def receive(self, data: bytes) -> Iterator[Event]:
        """Take bytes from the peer and return a lazy iterator over all events that were not iterated yet.

        The iterator raises PeerError. After that, every later iterator raises the same error.
        """
        self._in += data
        return self._events()

    def _events(self) -> Iterator[Event]:
        if self._error is not None:
            raise self._error
        try:
            while (frame := take_frame(self._in, self.peer)) is not None:
                yield self._event(frame)
        except PeerError as exc:
            self._error = exc
            raise

    def _event(self, frame: Frame) -> Event:
        if frame.kind is Kind.CREDIT:
            return self._credit(frame)
        if frame.kind in {Kind.DATA, Kind.EOF}:
            return self._data(frame)
        following = NEXT.get((self.state, frame.kind))
        if following is None:
            raise PeerError("frame out of order", f"{frame.kind.name} while {self.state.value}")
        body = decode_body(frame.kind, frame.payload)
        self.state = following
        if frame.kind in {Kind.WARM, Kind.WARMED}:
            self._reset_streams()
        return Control(frame.kind, body)

    def _data(self, frame: Frame) -> Event:
        stream = frame.stream
        if self.state not in _data_states(stream):
            raise PeerError("frame out of order", f"data on stream {stream} while {self.state.value}")
        if stream in self._ended_in:
            raise PeerError("frame out of order", f"stream {stream} has ended")
        if frame.kind is Kind.EOF:
            self._ended_in.add(stream)
            return Eof(stream)
        left = self._receive_window.get(stream, WINDOW) - len(frame.payload)
        if left < 0 or not frame.payload:
            raise PeerError("bad frame", f"data on stream {stream} is empty or exceeds its window")
        self._receive_window[stream] = left
        return Data(stream, frame.payload)

    def _credit(self, frame: Frame) -> Event:
        stream = frame.stream
        if len(frame.payload) != _CREDIT.size:
            raise PeerError("bad frame", f"credit of {len(frame.payload)} bytes for stream {stream}")
        more = _CREDIT.unpack(frame.payload)[0]
        total = self.window(stream) + more
        if not more or total > WINDOW:
            raise PeerError("bad frame", f"credit for stream {stream} is zero or exceeds its window")
        self._send_window[stream] = total
        return Credit(stream)

    # outgoing

    def send(self, kind: Kind, body: Mapping[str, object]) -> None:
        """Queue a control frame. Raises ChannelUsageError if the state does not allow it."""
        following = NEXT.get((self.state, kind))
        if SENDER[kind] is not self.role or following is None:
            raise ChannelUsageError(f"the {self.role.value} cannot send {kind.name} while {self.state.value}")
        self._out += encode(kind, 0, encode_body(kind, body))
        self.state = following

    def window(self, stream: int) -> int:
        """Return the number of bytes of *stream* that the peer accepts now."""
        return self._send_window.get(stream, WINDOW)

    def send_data(self, stream: int, data: bytes | bytearray | memoryview) -> int:
        """Queue as much of *data* as the window allows. Return the number of queued bytes. Raises ChannelUsageError."""
        self._check_ours(stream)
        if stream in self._ended_out:
            raise ChannelUsageError(f"stream {stream} has ended")
        view = memoryview(data)[: self.window(stream)]
        for at in range(0, len(view), DATA_MAX):
            self._out += encode(Kind.DATA, stream, bytes(view[at : at + DATA_MAX]))
        self._send_window[stream] = self.window(stream) - len(view)
        return len(view)

    def end_stream(self, stream: int) -> None:
        """Queue the end of a stream. Idempotent. Raises ChannelUsageError."""
        if stream not in self._ended_out:
            self._check_ours(stream)
            self._ended_out.add(stream)
            self._out += encode(Kind.EOF, stream)

    def _check_ours(self, stream: int) -> None:
        if stream_sender(stream) is not self.role or self.state not in _data_states(stream):
            state = self.state.value
            raise ChannelUsageError(f"the {self.role.value} cannot send on stream {stream} while {state}")

    def consumed(self, stream: int, count: int) -> None:
        """Grant credit for *count* processed bytes, in quarter windows. Raises ChannelUsageError for a wrong count."""
        unacknowledged = self._unacknowledged.get(stream, 0) + count
        window = self._receive_window.get(stream, WINDOW)
        if count < 0 or unacknowledged > WINDOW - window:
            raise ChannelUsageError(f"{count} bytes of stream {stream} were never received")
        if unacknowledged >= WINDOW // 4:
            self._out += encode(Kind.CREDIT, stream, _CREDIT.pack(unacknowledged))
            self._receive_window[stream] = window + unacknowledged
            unacknowledged = 0
        self._unacknowledged[stream] = unacknowledged

    def pending(self) -> int:
        """Number of queued bytes."""
        return len(self._out)

    def data_to_send(self, most: int) -> bytes:
        """Return the next bytes to write, at most *most* of them."""
        return bytes(self._out[:most])

    def sent(self, count: int) -> None:
        """Drop *count* written bytes of `data_to_send`."""
        del self._out[:count]


def _data_states(stream: int) -> frozenset[State]:
    return DATA_STATES[min(stream, int(Stream.FIRST_FILE))]
