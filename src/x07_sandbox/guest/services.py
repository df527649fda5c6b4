"""Services of the agent's that run like a command: confined by init, as the program's user, on standard streams.

All that they need is imported before, since the image of a command may not hold the agent's code.
"""

from __future__ import annotations

import os
import select
import socket
from typing import NoReturn

from x07_sandbox.guest.file_server import FileServer
from x07_sandbox.guest.system import write_all

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
    """Connect the standard streams to a port of this sandbox, until the server has sent all. Raises OSError."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        poll = select.poll()
        poll.register(0, select.POLLIN)
        poll.register(sock, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd != 0:
                    if not (data := sock.recv(_READ)):
                        return
                    write_all(1, data)
                elif data := os.read(0, _READ):
                    sock.sendall(data)
                else:
                    poll.unregister(0)
                    sock.shutdown(socket.SHUT_WR)
