"""A sink: the upstream server of one proxy. Every request that the proxy passes on is evidence of what it accepted."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final

from tests.fuzz.differential.evidence import Taken, taken

if TYPE_CHECKING:
    from collections.abc import Callable

_HEAD_MAX: Final = 256 * 1024
_OK: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nok\n"
_TUNNEL: Final = b"HTTP/1.1 200 Connection established\r\n\r\n"
_SWITCHED: Final = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


class Sink:
    """Answers one request on each connection, and records it. label: the proxy's name. open: its open connections."""

    def __init__(self, label: str, record: Callable[[Taken], None]) -> None:
        self.label = label
        self.open = 0
        self._record = record
        self._server: asyncio.Server | None = None

    async def start(self, address: str, port: int) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._serve, address, port, limit=_HEAD_MAX, backlog=500)

    async def stop(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
            async with asyncio.timeout(5):
                head = await reader.readuntil(b"\r\n\r\n")
            self._record(request(self.label, head))
            writer.write(_answer(head))
            async with asyncio.timeout(5):
                while await reader.read(65536):
                    pass
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        self.open -= 1


def request(label: str, head: bytes) -> Taken:
    """Return the evidence in the head of a request that a proxy has written."""
    line, *fields = head.decode("latin-1").split("\r\n")
    hosts = [value.strip() for name, _, value in (field.partition(":") for field in fields) if name.lower() == "host"]
    method, _, rest = line.partition(" ")
    target = rest.rpartition(" ")[0]
    if method.upper() == "CONNECT":
        return Taken(label, (target,), line)
    return taken(label, target, hosts, line)


def _answer(head: bytes) -> bytes:
    if head[:8].upper() == b"CONNECT ":
        return _TUNNEL
    return _SWITCHED if b"/ws" in head.partition(b"\r\n")[0] and b"pgrade:" in head else _OK
