"""Limits on the size of streams from the VMM, which may be hostile: console, QMP replies, standard error."""

import os
from typing import Final

_CHUNK: Final = 64 * 1024
_PRINTABLE: Final = {"\n", "\t"}


class BoundedStream:
    """Keeps the last *keep_bytes* bytes read from a non-blocking descriptor. The caller owns the descriptor."""

    def __init__(self, fd: int, *, keep_bytes: int) -> None:
        self.fd = fd
        self.ended = False
        self.total_bytes = 0
        self._keep_bytes = keep_bytes
        self._kept = bytearray()

    def read(self) -> None:
        """Read one chunk, or nothing if no data is ready."""
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
        """Return the kept text. Characters other than printable ones, tabs and newlines are replaced."""
        text = self._kept.decode("utf-8", errors="replace").replace("\r", "")
        return "".join(
            char if char.isprintable() or char in _PRINTABLE else "\N{REPLACEMENT CHARACTER}" for char in text
        )
