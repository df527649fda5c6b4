"""Services of the agent that run like a command: confined by init, as the program's user, on standard streams.

Everything that they need is imported before the fork, since the agent's code may be missing in the program's
namespaces.
"""

from __future__ import annotations

import os
import select
import socket
from typing import NoReturn

from x07_sandbox.guest.file_server import FileServer

_READ = 64 * 1024


def run(service: str, argv: list[str]) -> NoReturn:
    """Run a service until its streams end."""
    status = 1
    try:
        if service == "files":
            FileServer(0, 1).serve()
        else:
            _connect(int(argv[0]))
        status = 0
    finally:
        os._exit(status)


def _connect(port: int) -> None:
    """Connect the standard streams to a port of this sandbox, until the server ends its direction of the connection.

    Raises OSError.
    """
    with socket.socket() as sock:
        sock.connect(("127.0.0.1", port))  # create_connection would import a module of the program's Python
        there, back = _Way(0, sock.fileno()), _Way(sock.fileno(), 1)
        while not back.ended:
            ways = [way for way in (there, back) if not way.ended]
            reading = [way.in_fd for way in ways if not way.held]
            writing = [way.out_fd for way in ways if way.held]
            readable, writable, _ = select.select(reading, writing, [])
            for way in ways:
                if (way.out_fd in writable) if way.held else (way.in_fd in readable):
                    try:
                        way.move()
                    except OSError:
                        if way is back:
                            raise
                        way.give_up()  # the server reads no more, and may still have sent something
            if there.ended and not there.shut:
                there.shut = True
                sock.shutdown(socket.SHUT_WR)


class _Way:
    """One direction, which never blocks. held: bytes that were read and not yet written."""

    def __init__(self, in_fd: int, out_fd: int) -> None:
        self.in_fd = in_fd
        self.out_fd = out_fd
        self.held = b""
        self.ended = self.shut = False
        os.set_blocking(out_fd, False)

    def give_up(self) -> None:
        """Move nothing more in this direction."""
        self.held, self.ended = b"", True

    def move(self) -> None:
        """Read once, or write once. Raises OSError."""
        if self.held:
            self.held = self.held[os.write(self.out_fd, self.held) :]
        elif not (data := os.read(self.in_fd, _READ)):
            self.ended = True
        else:
            self.held = data
