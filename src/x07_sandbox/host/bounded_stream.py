"""Streams of the VMM besides the channel, hostile and bounded: console, QMP replies, its own messages."""

from __future__ import annotations

import os
from typing import Final

_CHUNK: Final = 64 * 1024
_PRINTABLE: Final = {"\n", "\t"}


class BoundedStream:
    """A non-blocking descriptor of which only the last *keep_bytes* are remembered. The descriptor is lent."""

    def __init__(self, fd: int, *, keep_bytes: int) -> None:
        self.fd = fd
        self.ended = False
        self.total_bytes = 0
        self._keep_bytes = keep_bytes
        self._kept = bytearray()

    def read(self) -> None:
        """Take one chunk: a flood costs its sender time, and us no memory."""
        if self.ended:
            return
        try:
            data = os.read(self.fd, _CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.ended = True
            return
        self.total_bytes += len(data)
        self._kept += data
        del self._kept[: -self._keep_bytes]

    def text(self) -> str:
        """What was kept, decoded, everything but printable characters, tabs and line ends replaced."""
        text = self._kept.decode("utf-8", errors="replace").replace("\r", "")
        return "".join(
            char if char.isprintable() or char in _PRINTABLE else "\N{REPLACEMENT CHARACTER}" for char in text
        )
