"""Requests about files in a sandbox, to the file server in the guest."""

from __future__ import annotations

import errno
import signal
from typing import TYPE_CHECKING, Any, Final

from x07_sandbox.channel.files import Answer, Buffer, Request, answer_of, encode
from x07_sandbox.errors import BackendError
from x07_sandbox.host.settings import FILES_S
from x07_sandbox.host.waiting import Deadline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from x07_sandbox.sessions.execution import Execution
    from x07_sandbox.sessions.session import Session
    from x07_sandbox.sessions.shared import SharedSession


_PROGRESS: Final = 64 * 1024  # bytes of content; a server that sends single bytes makes no progress


class FileServer:
    """The file server of a session, which is one of its commands. It answers one request after the other.

    All methods raise BackendError if the server or the session has ended, PeerError for a bad answer, and TimeoutError
    if the server makes no progress: a program may stop it, since it runs as the same user. Call `kill` then.
    """

    def __init__(self, session: Session | SharedSession, execution: Execution) -> None:
        """Take the command, whose service is FILES. Relative paths refer to its folder."""
        self._session = session
        self._execution = execution
        self._buffer = Buffer()
        self._path, self._within_s, self._deadline = "", FILES_S, Deadline.after(FILES_S)
        self._uncounted = 0  # bytes of content since the last progress

    @property
    def ended(self) -> bool:
        """Whether the server has ended."""
        return self._execution.ended

    def ask(self, request: Request, content: Iterable[bytes] = (), within_s: float = FILES_S) -> Answer:
        """Send a request with its content, and return the answer. Read what follows the answer with `piece`.

        within_s: how long the server may take to answer, and for each 64 KiB of content.
        """
        self._path, self._within_s = request.path, within_s
        self._moved(_PROGRESS)
        self._write(encode(request))
        for piece in content:
            self._write(piece)
            self._until(lambda: self._execution.has_room() or self._execution.ended)
            self._moved(len(piece))
        found: list[list[Any]] = []

        def answered() -> bool:
            self._fill()
            if not found and (values := self._buffer.take()) is not None:
                found.append(values)
            return bool(found) or self._execution.ended

        self._until(answered)
        if not found:
            raise self._lost()
        return answer_of(found[0])

    def piece(self, most: int) -> bytes:
        """Wait for content after an answer, and return 1 to *most* bytes of it. Raises OSError if there is no more."""
        if not self._buffer.data:  # else more would be read than is taken
            self._until(lambda: bool(self._buffer.data) or self._fill() > 0 or self._execution.ended)
        if not self._buffer.data:
            if self._execution.ended and not self._session.over:
                raise OSError(errno.EIO, "the file became shorter, or could not be read to its end")
            raise self._lost()
        data = self._buffer.piece(most)
        self._moved(len(data))
        return data

    def content(self, size: int) -> bytes:
        """Wait for *size* bytes after an answer, and return them."""
        data = bytearray()
        while len(data) < size:
            data += self.piece(size - len(data))
        return bytes(data)

    def kill(self) -> None:
        """End the server at once."""
        with self._session.using() as session:
            session.stop(self._execution, signal.SIGKILL)

    def close(self) -> None:
        """End the server once it has answered."""
        with self._session.using():
            self._execution.end_input()

    def _write(self, data: bytes) -> None:
        with self._session.using():
            self._execution.write(data)

    def _moved(self, size: int) -> None:
        """Count content that was sent or received. Progress extends the deadline."""
        self._uncounted += size
        if self._uncounted >= _PROGRESS:
            self._uncounted, self._deadline = 0, Deadline.after(self._within_s)

    def _until(self, done: Callable[[], bool]) -> None:
        """Wait until *done* returns True, or the session is over. Raises TimeoutError."""
        while not self._session.until(done, self._deadline.left_s()) and not self._session.over:
            if not self._deadline.missed_while_stopped():
                why = f"the file server of the sandbox made no progress for {self._within_s:g} s"
                raise TimeoutError(errno.ETIMEDOUT, why, self._path)
            self._moved(_PROGRESS)

    def _fill(self) -> int:
        self._buffer.data += self._session.read(self._execution)
        return len(self._buffer.data)

    def _lost(self) -> BackendError:
        what, why = "cannot reach the files of the sandbox", "its file server has ended"
        if self._session.over:
            return BackendError(what, why, "Open a new sandbox")
        return BackendError(what, f"{why}, by a program or because the sandbox was rolled back", "Try again")
