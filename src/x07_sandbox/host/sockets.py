"""Unix sockets in private folders, between processes of one user. Each side checks the uid of the other."""

import contextlib
import errno
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from x07_sandbox.host.linux import CREDENTIALS, fd_path, path_flag, peer_of
from x07_sandbox.host.paths import closing_fd

_WAITING_MAX: Final = 128  # connections that nobody has accepted yet
_BUSY_S: Final = 0.01


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The base of all messages between x07's processes."""


@contextlib.contextmanager
def _address(folder: Path, name: str) -> Iterator[str]:
    """Yield an address of a socket in *folder*, via /proc/self/fd to stay within the limit of 107 bytes."""
    with closing_fd(os.open(folder, path_flag() | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)) as fd:
        yield f"{fd_path(fd)}/{name}"


@contextlib.contextmanager
def listening(folder: Path, name: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> Iterator[socket.socket]:
    """Yield a socket on which only this user can connect, at *name* in *folder*, until the context ends."""
    listener = socket.socket(socket.AF_UNIX, kind)
    with listener, _address(folder, name) as address:
        os.fchmod(listener.fileno(), 0o600)  # the file gets this mode
        listener.bind(address)
        try:
            listener.listen(_WAITING_MAX)
            yield listener
        finally:
            (folder / name).unlink(missing_ok=True)


def connected(folder: Path, name: str, timeout_s: float, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    """Connect to the socket at *name* in *folder*. Raises OSError, such as PermissionError for that of another user."""
    connection = socket.socket(socket.AF_UNIX, kind)
    try:
        connection.settimeout(timeout_s)
        deadline = time.monotonic() + timeout_s
        with _address(folder, name) as address:
            while (problem := connection.connect_ex(address)) == errno.EAGAIN and time.monotonic() < deadline:
                time.sleep(_BUSY_S)  # many others wait to be accepted; no event says when there are fewer
        if problem:
            raise OSError(problem, os.strerror(problem))  # noqa: TRY301 - as connect(2) does
        if not is_own(connection):
            raise PermissionError("the socket belongs to another user")  # noqa: TRY301 - as connect(2) does
    except BaseException:
        connection.close()
        raise
    return connection


def is_own(connection: socket.socket) -> bool:
    """Return whether the other side is a process of this user."""
    return peer_of(connection)[1] == os.geteuid()


def received(connection: socket.socket, size: int, fds_most: int) -> tuple[bytes, list[int], int]:
    """Receive at most *size* bytes. Return them, their descriptors, which the caller must close, and the sender's pid.

    The kernel tells the pid only to a socket with SO_PASSCRED (unix(7)); else it is 0. Raises OSError.
    """
    room = socket.CMSG_SPACE(4 * fds_most) + socket.CMSG_SPACE(CREDENTIALS.size)
    data, parts, _, _ = connection.recvmsg(size, room, socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    sender = 0
    for level, kind, content in parts:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds += [number for (number,) in struct.iter_unpack("i", content[: len(content) // 4 * 4])]
        elif (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            sender, _, _ = CREDENTIALS.unpack(content)
    if len(fds) > fds_most:  # in the room for credentials that did not come
        for fd in fds:
            os.close(fd)
        raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
    return data, fds, sender
