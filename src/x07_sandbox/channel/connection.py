"""A link over non-blocking descriptors, and descriptors whose bytes a stream of the channel carries."""

from __future__ import annotations

import os
import select
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from x07_sandbox.channel import streams
from x07_sandbox.channel.link import DATA_MAX, Link, State

if TYPE_CHECKING:
    from x07_sandbox.channel.messages import Message
    from x07_sandbox.channel.streams import Event, Role, Streams


READ_SIZE: Final = 512 * 1024
_PART: Final = 4096
_FEW: Final = 8  # parts: passing many takes longer than reading a short message


class ReadBuffer:
    """A buffer to read from a descriptor, such as a console port of a guest.

    The console driver fills at most 4 KiB of each buffer, so many are passed at once.
    """

    def __init__(self) -> None:
        self._view = memoryview(bytearray(READ_SIZE))
        self._all = [self._view[at : at + _PART] for at in range(0, READ_SIZE, _PART)]
        self._few = self._parts = self._all[:_FEW]

    def read(self, fd: int) -> memoryview:
        """Read what has arrived, at most READ_SIZE bytes, which the next call replaces. Raises OSError."""
        size = os.readv(fd, self._parts)
        self._parts = self._all if size >= _FEW * _PART else self._few
        return self._view[:size]


class Connection:
    """A `Link`, and the descriptors that carry its bytes: one, or one per direction. The caller must close them."""

    def __init__(self, fd: int, role: Role, state: State = State.WAITING, *, out_fd: int | None = None) -> None:
        self.fd = fd
        self._out_fd = fd if out_fd is None else out_fd
        self.link = Link(role, state)
        self._buffer = ReadBuffer()
        for one in {fd, self._out_fd}:
            os.set_blocking(one, False)

    def register(self, poll: select.poll) -> None:
        """Register the descriptors with *poll*: for input, and for output if bytes are queued."""
        out = select.POLLOUT if self.link.pending() else 0
        if self._out_fd == self.fd:
            poll.register(self.fd, select.POLLIN | out)
        else:
            poll.register(self.fd, select.POLLIN)
            poll.register(self._out_fd, out)

    def read(self) -> Iterable[Message | Event] | None:
        """Read once.

        Return an iterator over messages and events, which raises PeerError for a violation; None if the peer has closed
        the channel.
        """
        try:
            data = self._buffer.read(self.fd)
        except BlockingIOError:
            return ()
        except ConnectionResetError:
            return None
        return self.link.receive(data) if data else None

    def flush(self) -> bool:
        """Write queued bytes until the descriptor would block. Return False if the peer has closed the channel."""
        while self.link.pending():
            try:
                self.link.streams.sent(os.write(self._out_fd, self.link.streams.data_to_send()))
            except BlockingIOError:
                return True
            except (BrokenPipeError, ConnectionResetError):
                return False
        return True


class Carrier:
    """Carries bytes between a descriptor, which the caller owns, and the stream *number*, without parsing them.

    With it, the egress relay shares the channel where a backend has a single byte stream.
    """

    def __init__(self, channel: Streams, number: int, fd: int) -> None:
        self.fd = fd
        self.number = number
        self._channel = channel
        self._held = bytearray()  # from the stream and not yet written; at most one window
        self._ended = False  # whether the descriptor has reached its end
        os.set_blocking(fd, False)

    def register(self, poll: select.poll) -> None:
        """Register the descriptor for the events that can be handled now."""
        reading = 0 if self._ended or not self._channel.window(self.number) else select.POLLIN
        if wanted := reading | (select.POLLOUT if self._held else 0):
            poll.register(self.fd, wanted)

    def handle(self, mask: int) -> None:
        """Handle events of the descriptor."""
        if self._held:
            self._write()
        if mask & ~select.POLLOUT:
            self.read()

    def read(self) -> None:
        """Send what can be read now, as far as the window allows."""
        while not self._ended and (window := self._channel.window(self.number)):
            try:
                data = os.read(self.fd, min(DATA_MAX, window))
            except BlockingIOError:
                return
            except ConnectionResetError:
                data = b""
            self._channel.send(self.number, data)
            if not data:
                self._ended = True
                self._channel.finish(self.number)

    def take(self, event: Event) -> None:
        """Take an event of the stream."""
        if event.type == streams.DATA:
            self._held += event.data
            self._write()

    def _write(self) -> None:
        try:
            count = os.write(self.fd, self._held)
        except BlockingIOError:
            return
        except (BrokenPipeError, ConnectionResetError):  # the process there has ended, which its waiter reports
            count = len(self._held)
        del self._held[:count]
        self._channel.consumed(self.number, count)
