"""The DNS server at 127.0.0.53, which answers from the policy's names only."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from x07_sandbox.guest.dns import answer

if TYPE_CHECKING:
    import socket

    from x07_sandbox.guest.dns import NameTable
    from x07_sandbox.guest.watcher import Watcher

_DATAGRAM_MAX: Final = 4096


class DnsServer:
    """Answers queries on a bound UDP socket, which stays the caller's."""

    def __init__(self, watcher: Watcher, names: NameTable, sock: socket.socket) -> None:
        self._names = names
        self._sock = sock
        watcher.watch(sock.fileno(), self._answer)

    def _answer(self, _mask: int) -> None:
        with contextlib.suppress(OSError):
            query, source = self._sock.recvfrom(_DATAGRAM_MAX)
            if (reply := answer(query, self._names)) is not None:
                self._sock.sendto(reply, source)
