"""Ports of a sandbox, for programs of the host."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from functools import partial
from typing import TYPE_CHECKING, Final

from x07_sandbox.channel.messages import CONNECT
from x07_sandbox.errors import SandboxError
from x07_sandbox.host import start_thread
from x07_sandbox.sessions.execution import order

if TYPE_CHECKING:
    from x07_sandbox.sessions.command import AnySandbox

_READ: Final = 64 * 1024
_WAITING: Final = 32  # connections that nobody has accepted yet
# If the client sends no more, and the server has sent nothing for this time, the client counts as gone: closing a
# connection looks like ending one direction of it.
_SILENT_S: Final = 60.0


class Forwarder:
    """Accepts connections on the host and carries each to a port of the sandbox, until the sandbox ends.

    address: where it accepts them: an address and a port, or the path of a Unix socket and 0.
    """

    def __init__(self, sandbox: AnySandbox, port: int, unix: str | None) -> None:
        """Start to listen. Raises OSError, SandboxError."""
        self._sandbox = sandbox
        self._port = port
        self._path = ""
        self._lock = threading.Lock()
        self._stopped = False
        self._connections: set[socket.socket] = set()
        self._listener = socket.socket(socket.AF_UNIX if unix is not None else socket.AF_INET, socket.SOCK_STREAM)
        try:
            if unix is not None:
                path = os.path.abspath(unix)  # noqa: PTH100 - text
                os.fchmod(self._listener.fileno(), 0o600)  # the file gets this mode when it is made
                self._listener.bind(path)
                self._path = path  # from now on it is ours
                self.address: tuple[str, int] = path, 0
            else:
                self._listener.bind(("127.0.0.1", 0))
                self.address = self._listener.getsockname()
            self._listener.listen(_WAITING)
            sandbox.at_end(self._stop)
            start_thread(threading.Thread(target=self._accept, name="x07-forward", daemon=True))
        except BaseException:
            self._stop()
            raise

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            for one in (self._listener, *self._connections):
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)  # ends what waits for it
            self._listener.close()
            path, self._path = self._path, ""
        if path:
            with contextlib.suppress(OSError):
                os.unlink(path)  # noqa: PTH108 - text

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it was stopped
            while True:
                connection, _ = self._listener.accept()
                with contextlib.suppress(OSError):  # no more threads allowed
                    start_thread(threading.Thread(target=self._serve, args=(connection,), daemon=True))

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            with self._lock:
                if self._stopped:
                    return
                self._connections.add(connection)
            try:
                self._carry(connection)
            finally:
                with self._lock:
                    self._connections.discard(connection)

    def _carry(self, connection: socket.socket) -> None:
        try:
            command = self._sandbox.start(order([str(self._port)], service=CONNECT))
        except SandboxError:  # it has ended, or has too many connections
            return
        read = partial(connection.recv, _READ)
        reader = start_thread(threading.Thread(target=command.send_all, args=(read,), daemon=True))
        try:
            ended = False
            while not ended:
                silent = command.execution.input_done
                ended, pieces = command.next_pieces(within_s=_SILENT_S)
                for stream, data in pieces:
                    if stream == "stdout":
                        connection.sendall(data)
                if silent and not pieces and not ended:
                    raise TimeoutError
        except (OSError, SandboxError):
            command.kill()
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)  # ends `recv`
        reader.join()
