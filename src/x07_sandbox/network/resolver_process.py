"""The resolver's process: it keeps the right to look names up, and no other.

    python -I -S -c CODE GATE_FD UID

`processes.py` starts it. UID: a uid of its own to take where it was started by root, else -1.
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import threading
from typing import Final

from x07_sandbox.jail.own_limits import confine
from x07_sandbox.network.resolver import serve

_STACK_BYTES: Final = 512 * 1024
_ARENA_MAX: Final = -8


def main() -> None:
    """Be a resolver, as the command line says, until the gate is gone."""
    sock_fd, uid = map(int, sys.argv[1:])
    # Threads are many and small: with the usual stacks and heaps (mallopt(3)) they would not fit in the address space.
    threading.stack_size(_STACK_BYTES)
    ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)
    os.environ["RES_OPTIONS"] = "timeout:2 attempts:2"  # resolv.conf(5): the gate waits no longer than that
    sock = socket.socket(fileno=sock_fd)
    confine("resolver", uid=None if uid < 0 else uid)
    serve(sock)
