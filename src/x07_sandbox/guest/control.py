"""Messages between the agent and init of the program's namespaces, over a socket pair.

Each message is its length and a tuple encoded with marshal, which only these two exchange. To init:

    settings, VALUES      apply settings; answered with ready
    command, KEY, PROGRAM, LIMITS, SERVICE, TERMINAL
                          start one more process, which waits for its start message; with its descriptors
    last, KEY             kill all other processes once that command has ended
    signal, KEY, NUMBER   send a signal to a command; SIGKILL goes to its descendants too
    end                   kill all processes; answered with ready

From init:

    ready
    failed, STAGE, ERRNO, MESSAGE
    exited, KEY, WAIT_STATUS
"""

from __future__ import annotations

import marshal
import os
import socket
import struct
from typing import Any, Final

from x07_sandbox.guest.system import write_all

SETTINGS: Final = "settings"
COMMAND: Final = "command"
LAST: Final = "last"
SIGNAL: Final = "signal"
END: Final = "end"
READY: Final = "ready"
FAILED: Final = "failed"
EXITED: Final = "exited"

_LENGTH: Final = struct.Struct("=I")
_FD: Final = struct.Struct("=i")
_FDS_MAX: Final = 16


def send(sock: socket.socket, message: tuple[Any, ...], fds: tuple[int, ...] = ()) -> None:
    """Send a message with descriptors. Raises OSError."""
    data = marshal.dumps(message)
    data = _LENGTH.pack(len(data)) + data
    sent = socket.send_fds(sock, [data], fds) if fds else 0
    write_all(sock.fileno(), data[sent:])


def receive(sock: socket.socket) -> tuple[tuple[Any, ...], list[int]] | None:
    """Wait for a message; return it with its descriptors, or None if the other side has ended."""
    fd, room = sock.fileno(), socket.CMSG_SPACE(_FDS_MAX * _FD.size)
    # Not socket.recv_fds, which ignores the flag.
    head, rights, _, _ = sock.recvmsg(_LENGTH.size, room, socket.MSG_CMSG_CLOEXEC)
    fds = [number for _, _, data in rights for (number,) in _FD.iter_unpack(data)]
    head += _read(fd, _LENGTH.size - len(head)) if head else b""
    if len(head) < _LENGTH.size:
        return None
    data = _read(fd, _LENGTH.unpack(head)[0])
    message: tuple[Any, ...] = marshal.loads(data)  # noqa: S302 - from our own other process
    return message, fds


def _read(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := os.read(fd, size - len(data))):
        data += more
    return data
