"""Messages between the agent and init of the program's namespaces.

Those to init go over a socket, which carries descriptors. Those from init go over a pipe, since a fresh clone has
executed the kernel's code for pipes anyway. A message is a length and a tuple encoded with marshal, which is safe
because both ends are our own code. To init:

    settings, VALUES      apply settings; answered with ready
    command, KEY, PROGRAM, LIMITS, SERVICE, TERMINAL
                          start one more process, which waits for its start message; with its descriptors
    last, KEY             kill all other processes once that command has ended; None for no command. Initially, it is
                          the first process, which waits from the start
    signal, KEY, NUMBER   send a signal to a command; SIGKILL goes to its descendants too
    end                   kill all processes; answered with ready

From init:

    ready
    failed, STAGE, ERRNO, MESSAGE
    exited, KEY, WAIT_STATUS, IS_LAST
                          a command has ended; with IS_LAST, all other processes have been killed
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


def send(fd: int, message: tuple[Any, ...]) -> None:
    """Send a message. Raises OSError."""
    data = marshal.dumps(message)
    write_all(fd, _LENGTH.pack(len(data)) + data)


def send_fds(sock: socket.socket, message: tuple[Any, ...], fds: tuple[int, ...]) -> None:
    """Send a message with descriptors. Raises OSError."""
    data = marshal.dumps(message)
    data = _LENGTH.pack(len(data)) + data
    sent = socket.send_fds(sock, [data], fds)
    write_all(sock.fileno(), data[sent:])


def receive(fd: int, head: bytes = b"") -> tuple[Any, ...] | None:
    """Wait for a message, and return it; None if the other side has ended.

    head: the bytes of it that were read already.
    """
    head += _read(fd, _LENGTH.size - len(head))
    if len(head) < _LENGTH.size:
        return None
    message: tuple[Any, ...] = marshal.loads(_read(fd, _LENGTH.unpack(head)[0]))  # noqa: S302 - from our own process
    return message


def receive_fds(sock: socket.socket) -> tuple[tuple[Any, ...] | None, list[int]]:
    """Wait for a message and its descriptors. The message is None if the other side has ended."""
    # Not socket.recv_fds, which ignores its flags and so MSG_CMSG_CLOEXEC.
    room = socket.CMSG_SPACE(_FDS_MAX * _FD.size)
    head, rights, _, _ = sock.recvmsg(_LENGTH.size, room, socket.MSG_CMSG_CLOEXEC)
    fds = [number for _, _, data in rights for (number,) in _FD.iter_unpack(data)]
    return receive(sock.fileno(), head) if head else None, fds


def _read(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := os.read(fd, size - len(data))):
        data += more
    return data
