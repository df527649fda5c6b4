"""Carry the bytes of a descriptor over a stream of the channel, in both directions, without parsing them.

With it, the egress relay shares the channel where a backend has a single byte stream.
"""

from __future__ import annotations

import os
import select
from typing import TYPE_CHECKING

from x07_sandbox.channel import streams
from x07_sandbox.channel.link import DATA_MAX

if TYPE_CHECKING:
    from x07_sandbox.channel.streams import Event, Streams


class Carrier:
    """Carries bytes between a descriptor, which the caller owns, and the stream *number*."""

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
