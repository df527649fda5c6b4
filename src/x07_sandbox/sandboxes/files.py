"""Requests about files in a sandbox, to the file server in the guest."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from x07_sandbox.channel.files import Answer, Buffer, Request, answer_of, encode
from x07_sandbox.channel.messages import CommandLimits, Exec
from x07_sandbox.errors import BackendError
from x07_sandbox.sandboxes.execution import FILES
from x07_sandbox.sandboxes.transfers import CommandStreams, Inbox

if TYPE_CHECKING:
    from collections.abc import Iterable

    from x07_sandbox.sandboxes.session import Session
    from x07_sandbox.sandboxes.shared import SharedSession


class FileServer:
    """The file server of a session, which is one of its commands. It answers one request after the other.

    cwd: the folder to which relative paths refer.

    All methods raise BackendError if the server or the session has ended, and PeerError for a bad answer.
    """

    def __init__(self, session: Session | SharedSession, number: int, limits: CommandLimits, cwd: str = "/") -> None:
        self._session = session
        self._inbox = Inbox("answers of the file server")
        given = CommandStreams(stdin_fd=None, stdout=self._inbox, stderr=Inbox("errors"), open_input=True)
        self._execution = session.execute(Exec(number, [], {}, cwd, limits, FILES), given, None)
        self._buffer = Buffer()

    def ask(self, request: Request, content: Iterable[bytes] = ()) -> Answer:
        """Send a request with its content, and return the answer. Read what follows the answer with `piece`."""
        self._session.write(self._execution, encode(request))
        for piece in content:
            self._session.write(self._execution, piece)
            if not self._session.until(lambda: self._execution.has_room() or self._execution.ended):
                raise self._lost()
        found: list[list[Any]] = []

        def answered() -> bool:
            self._fill()
            if not found and (values := self._buffer.take()) is not None:
                found.append(values)
            return bool(found) or self._execution.ended

        if not self._session.until(answered) or not found:
            raise self._lost()
        return answer_of(found[0])

    def piece(self, most: int) -> bytes:
        """Wait for content after an answer, and return 1 to *most* bytes of it. Raises OSError if there is no more."""
        if not self._buffer.data:  # else more would be read than is taken
            self._session.until(lambda: bool(self._buffer.data) or self._fill() > 0 or self._execution.ended)
        if not self._buffer.data:
            if self._execution.ended and not self._session.over:
                raise OSError(errno.EIO, "the file became shorter, or could not be read to its end")
            raise self._lost()
        return self._buffer.piece(most)

    def content(self, size: int) -> bytes:
        """Wait for *size* bytes after an answer, and return them."""
        data = bytearray()
        while len(data) < size:
            data += self.piece(size - len(data))
        return bytes(data)

    def kill(self) -> None:
        """End the server at once."""
        self._session.stop(self._execution)

    def close(self) -> None:
        """End the server once it has answered."""
        self._session.end_input(self._execution)

    def _fill(self) -> int:
        self._buffer.data += self._session.read(self._execution, self._inbox)
        return len(self._buffer.data)

    def _lost(self) -> BackendError:
        return BackendError("cannot reach the files of the sandbox", "its file server has ended", "Open a new sandbox")
