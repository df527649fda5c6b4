"""The resolver's process, which may only resolve names. `processes.py` starts it.

    python -I -S -c CODE GATE_FD UID

UID: the uid to switch to if root started the process, else -1.
"""

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
    """Run the resolver until the gate exits."""
    sock_fd, uid = map(int, sys.argv[1:])
    # With default stacks and heaps (mallopt(3)) the threads would exceed the address space limit.
    threading.stack_size(_STACK_BYTES)
    ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)
    os.environ["RES_OPTIONS"] = "timeout:2 attempts:2"  # resolv.conf(5): the gate does not wait longer
    sock = socket.socket(fileno=sock_fd)
    confine("resolver", uid=None if uid < 0 else uid)
    serve(sock)
