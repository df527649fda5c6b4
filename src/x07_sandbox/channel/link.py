"""One end of the channel as a state machine without I/O: bytes in, events out, bytes out.

`NEXT` is the protocol: the state after each control frame. Data frames change no state; `DATA_STATES` says when they
are in order. A missing pair raises PeerError (their fault) or ChannelUsageError (ours). Both ends run the same table,
so the host's idea of the state is never what the guest claims but what it may do.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator, Mapping
from typing import Any, Final

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
    """Where the conversation stands."""

    WAITING = "waiting"  # for the guest to speak
    GREETED = "greeted"
    WARMING = "warming"
    WARM = "warm"  # a machine is saved here, and every clone of it begins here
    SEEDING = "seeding"
    READY = "ready"
    PREPARING = "preparing"
    RUNNING = "running"
    COLLECTING = "collecting"  # the program has ended; its output file may follow
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
    # After a program of ours that only warms the machine: the next one finds everything as the first did.
    (State.COLLECTING, Kind.WARM): State.WARMING,
    # The host cannot know yet that the guest has just finished or failed, so its STOP may cross that frame.
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
    Stream.FIRST_FILE: _FROM_START,  # stands for all files that go in
}


class _Event:
    """What came. Plain classes: those of `dataclasses` cost each start of the command several milliseconds."""

    __slots__ = ()
    __match_args__: tuple[str, ...] = ()

    def _values(self) -> tuple[object, ...]:
        return tuple(getattr(self, name) for name in self.__match_args__)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Event) and type(self) is type(other) and self._values() == other._values()

    __hash__ = None  # type: ignore[assignment]  # a body is no constant

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self._values()}"


class Control(_Event):
    """A control frame came."""

    __slots__ = __match_args__ = ("kind", "body")

    def __init__(self, kind: Kind, body: dict[str, Any]) -> None:
        self.kind = kind
        self.body = body


class Data(_Event):
    """Bytes of a stream came; call `Link.consumed` once they are taken."""

    __slots__ = __match_args__ = ("stream", "payload")

    def __init__(self, stream: int, payload: bytes) -> None:
        self.stream = stream
        self.payload = payload


class Eof(_Event):
    """A stream has ended."""

    __slots__ = __match_args__ = ("stream",)

    def __init__(self, stream: int) -> None:
        self.stream = stream


class Credit(_Event):
    """The peer takes more bytes of a stream."""

    __slots__ = __match_args__ = ("stream",)

    def __init__(self, stream: int) -> None:
        self.stream = stream


Event = Control | Data | Eof | Credit


class Link:
    """One end of the conversation. Not thread-safe: its owner is one loop.

    state: where it goes on: with a clone of a saved machine the first frames were exchanged before it was saved.
    """

    def __init__(self, role: Role, state: State = State.WAITING) -> None:
        self.role = role
        self.peer = Role.GUEST if role is Role.HOST else Role.HOST
        self.state = state
        self._in = bytearray()
        self._error: PeerError | None = None
        self._out = bytearray()
        self._may_send: dict[int, int] = {}  # bytes left of the window, per stream that we send
        self._may_come: dict[int, int] = {}
        self._unacknowledged: dict[int, int] = {}
        self._ended_out: set[int] = set()
        self._ended_in: set[int] = set()

    def _forget_streams(self) -> None:
        """A new job's streams begin: nothing of the last one's is on the way any more, at either end."""
        for kept in (self._may_send, self._may_come, self._unacknowledged, self._ended_out, self._ended_in):
            kept.clear()

    # what comes in

    def receive(self, data: bytes) -> Iterator[Event]:
        """Take bytes from the peer; iterate over their events, each decoded when it is asked for.

        So events do not depend on how the stream was cut, and none before a fault is lost. A next call goes on where an
        iteration was given up. The iteration raises PeerError, from then on always: the link is of no more use.
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
            self._forget_streams()
        return Control(frame.kind, body)

    def _data(self, frame: Frame) -> Event:
        stream = frame.stream
        if self.state not in _data_states(stream):
            raise PeerError("frame out of order", f"data on stream {stream} while {self.state.value}")
        if stream in self._ended_in:
            raise PeerError("frame out of order", f"stream {stream} had ended")
        if frame.kind is Kind.EOF:
            self._ended_in.add(stream)
            return Eof(stream)
        left = self._may_come.get(stream, WINDOW) - len(frame.payload)
        if left < 0 or not frame.payload:
            raise PeerError("bad frame", f"stream {stream} sent more than its window, or nothing")
        self._may_come[stream] = left
        return Data(stream, frame.payload)

    def _credit(self, frame: Frame) -> Event:
        stream = frame.stream
        if len(frame.payload) != _CREDIT.size:
            raise PeerError("bad frame", f"credit of {len(frame.payload)} bytes for stream {stream}")
        more = _CREDIT.unpack(frame.payload)[0]
        total = self.window(stream) + more
        if not more or total > WINDOW:
            raise PeerError("bad frame", f"more credit than the window of stream {stream}, or none")
        self._may_send[stream] = total
        return Credit(stream)

    # what goes out

    def send(self, kind: Kind, body: Mapping[str, object]) -> None:
        """Queue a control frame. Raises ChannelUsageError if it is not our turn."""
        following = NEXT.get((self.state, kind))
        if SENDER[kind] is not self.role or following is None:
            raise ChannelUsageError(f"{kind.name} cannot be sent by the {self.role.value} while {self.state.value}")
        self._out += encode(kind, 0, encode_body(kind, body))
        self.state = following

    def window(self, stream: int) -> int:
        """How many bytes of *stream* the peer takes now."""
        return self._may_send.get(stream, WINDOW)

    def send_data(self, stream: int, data: bytes | bytearray | memoryview) -> int:
        """Queue as much of *data* as the peer takes; the number of bytes queued. Raises ChannelUsageError."""
        self._check_ours(stream)
        if stream in self._ended_out:
            raise ChannelUsageError(f"stream {stream} has ended")
        view = memoryview(data)[: self.window(stream)]
        for at in range(0, len(view), DATA_MAX):
            self._out += encode(Kind.DATA, stream, bytes(view[at : at + DATA_MAX]))
        self._may_send[stream] = self.window(stream) - len(view)
        return len(view)

    def end_stream(self, stream: int) -> None:
        """Queue the end of a stream; a second call does nothing. Raises ChannelUsageError."""
        if stream not in self._ended_out:
            self._check_ours(stream)
            self._ended_out.add(stream)
            self._out += encode(Kind.EOF, stream)

    def _check_ours(self, stream: int) -> None:
        if stream_sender(stream) is not self.role or self.state not in _data_states(stream):
            state = self.state.value
            raise ChannelUsageError(f"stream {stream} is not for the {self.role.value} to send while {state}")

    def consumed(self, stream: int, count: int) -> None:
        """Tell the peer, in steps of a quarter window, that *count* bytes of *stream* were taken.

        Raises ChannelUsageError if these are more than have come.
        """
        waiting = self._unacknowledged.get(stream, 0) + count
        if count < 0 or waiting > WINDOW - self._may_come.get(stream, WINDOW):
            raise ChannelUsageError(f"{count} bytes of stream {stream} were never there to be taken")
        if waiting >= WINDOW // 4:
            self._out += encode(Kind.CREDIT, stream, _CREDIT.pack(waiting))
            self._may_come[stream] = self._may_come.get(stream, WINDOW) + waiting
            waiting = 0
        self._unacknowledged[stream] = waiting

    def pending(self) -> int:
        """Bytes queued and not yet taken by `sent`."""
        return len(self._out)

    def data_to_send(self, most: int) -> bytes:
        """The next bytes for the peer, at most *most*; call `sent` with what was written."""
        return bytes(self._out[:most])

    def sent(self, count: int) -> None:
        """Forget *count* bytes that have been written."""
        del self._out[:count]


def _data_states(stream: int) -> frozenset[State]:
    return DATA_STATES[min(stream, int(Stream.FIRST_FILE))]
