"""DNS server of programs without a network. It refuses every name and counts them, and forwards nothing.

The C library then reports the same error as without any server ("Temporary failure in name resolution"), and the
session can say which names the program looked up.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Final

from x07_sandbox.channel import egress
from x07_sandbox.channel.messages import DENIED_MAX
from x07_sandbox.guest.audit import Refusal
from x07_sandbox.guest.dns import REFUSED, NameTable, answer

RESOLV_CONF: Final = f"nameserver {egress.DNS}\noptions attempts:1\n"
_PORT: Final = 53
_QUERY_MAX: Final = 4096
_QUERIES: Final = 64  # answered in one turn of the agent


class NoNetwork:
    """The server, in the network namespace of programs. *fd* is readable when `serve` has queries to answer."""

    def __init__(self, netns_fd: int) -> None:
        """Open the socket. Raises OSError."""
        self._found: dict[Refusal, int] = {}
        self._uncounted = 0
        self._names = NameTable({}, [])
        self._names.unlisted, self._names.on_unlisted = REFUSED, self._count
        own = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.setns(netns_fd, os.CLONE_NEWNET)
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        finally:
            os.setns(own, os.CLONE_NEWNET)
            os.close(own)
        self._socket.bind((egress.DNS, _PORT))
        self.fd = self._socket.fileno()

    def serve(self) -> None:
        """Answer queries that have arrived."""
        with contextlib.suppress(OSError):
            for _ in range(_QUERIES):
                query, source = self._socket.recvfrom(_QUERY_MAX)
                if (reply := answer(query, self._names)) is not None:
                    self._socket.sendto(reply, source)

    def take(self) -> tuple[dict[Refusal, int], int]:
        """Return and forget how often each name was looked up, and how many lookups that does not include."""
        found, uncounted = self._found, self._uncounted
        self._found, self._uncounted = {}, 0
        return found, uncounted

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _count(self, name: str) -> None:
        refusal = Refusal("network", "lookup", 0, name, write=False)
        if refusal in self._found or len(self._found) < DENIED_MAX:
            self._found[refusal] = self._found.get(refusal, 0) + 1
        else:
            self._uncounted += 1
