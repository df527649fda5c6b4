"""The resolver's process: it keeps the right to look names up, and no other.

    python -I -S -c CODE GATE_FD UID

`processes.py` starts it. UID: a uid of its own to take where it was started by root, else -1.
"""

from __future__ import annotations

import socket
import sys

from x07_sandbox.jail.own_limits import confine
from x07_sandbox.network.resolver import serve


def main() -> None:
    """Be a resolver, as the command line says, until the gate is gone."""
    sock_fd, uid = map(int, sys.argv[1:])
    sock = socket.socket(fileno=sock_fd)
    confine("resolver", uid=None if uid < 0 else uid)
    serve(sock)
