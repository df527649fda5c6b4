"""Names for the program: a server at 127.0.0.53 that asks nobody."""

from __future__ import annotations

import contextlib
import select
import socket
from functools import partial
from typing import TYPE_CHECKING, Final

from x07_sandbox.guest.dns import answer, split_stream

if TYPE_CHECKING:
    from x07_sandbox.guest.dns import Names
    from x07_sandbox.guest.watcher import Watcher

_DATAGRAM_MAX: Final = 4096
_STREAM_MAX: Final = 65_535
_STREAMS_MAX: Final = 64
_ASKED_MAX: Final = 2 + 2 * _STREAM_MAX  # bytes of questions that wait


class DnsServer:
    """Both transports. udp, tcp: bound, the second listening; lent."""

    def __init__(self, watcher: Watcher, names: Names, udp: socket.socket, tcp: socket.socket) -> None:
        self._watcher = watcher
        self._names = names
        self._udp = udp
        self._tcp = tcp
        self._streams: dict[int, tuple[socket.socket, bytearray]] = {}
        watcher.watch(udp.fileno(), self._answer_datagram)
        watcher.watch(tcp.fileno(), self._accept)

    def _answer_datagram(self, _mask: int) -> None:
        with contextlib.suppress(OSError):
            query, source = self._udp.recvfrom(_DATAGRAM_MAX)
            if (said := answer(query, self._names, _DATAGRAM_MAX)) is not None:
                self._udp.sendto(said, source)

    def _accept(self, _mask: int) -> None:
        with contextlib.suppress(OSError):
            sock, _ = self._tcp.accept()
            if len(self._streams) >= _STREAMS_MAX:
                self._end(next(iter(self._streams)))  # the oldest: a program cannot block its own children for ever
            sock.setblocking(False)  # noqa: FBT003 - it takes no names
            self._streams[sock.fileno()] = (sock, bytearray())
            self._watcher.watch(sock.fileno(), partial(self._answer_stream, sock.fileno()), select.EPOLLIN)

    def _answer_stream(self, fd: int, _mask: int) -> None:
        sock, asked = self._streams[fd]
        try:
            data = sock.recv(_STREAM_MAX)
            asked += data
            while (query := split_stream(asked)) is not None:
                if (said := answer(query, self._names, _STREAM_MAX)) is not None:
                    sock.sendall(len(said).to_bytes(2, "big") + said)  # small: what does not fit ends it
        except OSError:
            data = b""
        if not data or len(asked) > _ASKED_MAX:
            self._end(fd)

    def _end(self, fd: int) -> None:
        sock, _ = self._streams.pop(fd)
        self._watcher.forget(fd)
        sock.close()
