"""Resident processes of x07, such as the holder of a sandbox and the pool: how they start, and how they serve.

A resident process outlives the command that starts it. It reports to that command through a pipe, with messages of
`Starting` and at last one of its own, and serves clients over a socket, each in a thread. A message is its length in
four bytes, most significant first, and a tagged MessagePack array. Both sides are processes of one user.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import threading
import time
from typing import IO, TYPE_CHECKING, Any, Final, Generic, TypeVar

import msgspec

from x07_sandbox import errors
from x07_sandbox.errors import Cancelled, Command, Flag, HostError, SandboxError, Text
from x07_sandbox.host import start_thread
from x07_sandbox.host.documents import encodable, prepared
from x07_sandbox.host.paths import host_error
from x07_sandbox.host.processes import reap_later, start_in_background
from x07_sandbox.host.sockets import Message, is_own
from x07_sandbox.host.waiting import Event, Notice, input_poll, wait_readable, write_all

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

_T = TypeVar("_T")
_FRAME_MAX: Final = 1 << 30  # for patches
_HEAD: Final = 4
_READ: Final = 256 * 1024
_NO_FDS_S: Final = 0.2
_CLIENTS_MAX: Final = 512  # connections that one process serves at once
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_MARKS: Final[dict[str, type[str]]] = {"flag": Flag, "command": Command, "": str}

Marked = tuple[str, str]
"""A part of a text: how it is marked, a key of _MARKS, and its words."""


class Problem(Message, frozen=True):
    """Something failed. kind: the class of the error, in `errors`. texts: what, why, fix."""

    kind: str
    texts: tuple[list[Marked], ...]
    code: str

    @staticmethod
    def of(exc: SandboxError) -> Problem:
        """Return the message about an error."""
        return Problem(kind=type(exc).__name__, texts=tuple(map(_marked, exc.args)), code=exc.code)

    def error(self) -> SandboxError:
        """Return the error."""
        kind = getattr(errors, self.kind, SandboxError)
        kind = kind if isinstance(kind, type) and issubclass(kind, SandboxError) else SandboxError
        found: SandboxError = kind(*map(_unmarked, self.texts))
        found.code = self.code
        return found


class Progress(Message, frozen=True):
    """A line of progress. notice: whether it is shown without a terminal, too."""

    text: str
    notice: bool

    @staticmethod
    def of(text: str) -> Progress:
        """Return the message about a line."""
        return Progress(text=str(text), notice=isinstance(text, Notice))

    def line(self) -> str:
        """Return the line."""
        return Notice(self.text) if self.notice else self.text


class Ready(Message, frozen=True):
    """The process serves clients. what: what the command that started it wants to know."""

    what: str


Starting = Problem | Progress | Ready


def packed(message: Message) -> bytes:
    """Return the bytes of a message."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(_HEAD, "big") + body


class Reader(Generic[_T]):
    """Splits the bytes of a connection into messages of one of several types."""

    def __init__(self, types: Any) -> None:  # noqa: ANN401 - a union
        self._data = bytearray()
        self._decoder: msgspec.msgpack.Decoder[_T] = msgspec.msgpack.Decoder(prepared(types))

    def take(self, data: bytes) -> list[_T]:
        """Add bytes, and return the messages that are complete. Raises msgspec.ValidationError, ValueError."""
        self._data += data
        found = []
        while len(self._data) >= _HEAD:
            end = _HEAD + int.from_bytes(self._data[:_HEAD], "big")
            if end > _FRAME_MAX:
                raise ValueError("a message is too long")
            if len(self._data) < end:
                break
            body = bytes(self._data[_HEAD:end])
            del self._data[:end]  # cheap for a bytearray
            found.append(self._decoder.decode(body))
        return found


def _mark(value: object) -> str:
    return next((mark for mark, kind in _MARKS.items() if mark and isinstance(value, kind)), "")


def _marked(text: Text) -> list[Marked]:
    return [(_mark(part), encodable(part)) for part in ((text,) if isinstance(text, str) else text)]


def _unmarked(parts: list[Marked]) -> Text:
    return tuple(_MARKS.get(mark, str)(text) for mark, text in parts)


# the command that starts the process


def start(
    what: str,
    module: str,
    *words: str,
    log: IO[bytes],
    progress: Callable[[str], object],
    given: bytes = b"",
    cancel: tuple[int, str] | None = None,
) -> tuple[str, int]:
    """Start a resident process, and wait until it is ready. Return what it reports, and its pid. Raises SandboxError.

    what: what failed if it cannot start, for the error. module: what it runs, with the arguments *words*. log: its
    standard error. given: its standard input. cancel: a descriptor that is readable once the caller no longer wants it,
    and what did not happen, for the error Cancelled, which is raised then.
    """
    ready_r, ready_w = os.pipe()
    with os.fdopen(ready_r, "rb", buffering=0) as ready:
        child = start_in_background(module, *words, ready_fd=ready_w, errors=log, stdin=subprocess.PIPE)
        os.close(ready_w)
        assert child.stdin is not None  # it is a pipe
        try:
            with contextlib.suppress(BrokenPipeError), child.stdin:  # it has ended; see below
                child.stdin.write(given)
            reader: Reader[Starting] = Reader(Starting)
            while data := _next(ready, cancel):
                for message in reader.take(data):
                    if isinstance(message, Ready):
                        reap_later(child)
                        return message.what, child.pid
                    if isinstance(message, Problem):
                        raise message.error()  # noqa: TRY301 - from another process
                    progress(message.line())
        except BaseException:
            child.terminate()
            child.wait()
            raise
        child.wait()
    last = os.pread(log.fileno(), _READ, 0).decode("utf-8", "replace").strip().splitlines()[-1:]
    why = f"its process ended: {last[0] if last else f'status {child.returncode}'}"
    if isinstance(log.name, str):  # a memory file has none
        why += f"; see {log.name}"
    raise HostError(what, why, "Run x07 doctor")


def _next(ready: IO[bytes], cancel: tuple[int, str] | None) -> bytes:
    """Return what a new process reports next, or b"" at its end. Raises Cancelled."""
    if cancel is not None:
        cancel_fd, what = cancel
        if any(fd == cancel_fd for fd, _ in input_poll(cancel_fd, ready.fileno()).poll()):
            raise Cancelled(what, "it was cancelled", "Open it again")
    return ready.read(_READ)


# the process itself


class Starter:
    """Reports to the command that starts this process, until `close`. Owns the descriptor. Thread-safe."""

    def __init__(self, owned_fd: int) -> None:
        self._file = os.fdopen(owned_fd, "wb", buffering=0)

    def report(self, message: Starting) -> bool:
        """Send a message. Return whether the command is still there; once this is closed, do nothing."""
        try:
            write_all(self._file.fileno(), packed(message))
        except ValueError:  # closed
            return True
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Close the descriptor. A second call does nothing."""
        self._file.close()


def run(starter: Starter, work: Callable[[], object]) -> int:
    """Carry out the work of a resident process, and report an error that ends it. Return the exit status."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each client takes one or two, each VM about ten
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        work()
    except (SandboxError, OSError) as exc:
        if (error := exc if isinstance(exc, SandboxError) else host_error(exc)) is None:
            raise
        starter.report(Problem.of(error))
        return 125
    return 0


class Server:
    """Accepts connections, and serves each in a thread, until `end`. *serve* gets those of this user's processes."""

    def __init__(self, listener: socket.socket, serve: Callable[[socket.socket], object]) -> None:
        self._listener = listener
        self._serve = serve
        self._end = Event()
        self._threads: list[threading.Thread] = []
        self.signal: int | None = None  # that has ended it

    @property
    def end_fd(self) -> int:
        """A descriptor that is readable once the service ends."""
        return self._end.fd

    @property
    def ended(self) -> bool:
        """Whether `end` was called."""
        return wait_readable(self._end.fd, 0)

    def end(self, number: int | None = None, _frame: object = None) -> None:
        """Stop serving. A signal handler may call this, and more than one call is allowed."""
        self.signal = number
        self._end.set()

    def end_on_signals(self) -> None:
        """Let SIGTERM and SIGINT end the service. For the main thread."""
        for number in _SIGNALS:
            signal.signal(number, self.end)
        self._end.set_by_signals()

    def serve(self, idle: Callable[[], bool] = lambda: False, look_s: float | None = None) -> None:
        """Serve until `end` is called, or *idle* returns True, which is called every *look_s* seconds."""
        poll = input_poll(self._listener.fileno(), self._end.fd)
        while not idle():
            for fd, _ in poll.poll(None if look_s is None else look_s * 1000):
                if fd == self._end.fd:
                    return
                self._accept()

    def join(self, within_s: float) -> None:
        """Wait for the threads of clients."""
        until = time.monotonic() + within_s
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _accept(self) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        try:
            connection, _ = self._listener.accept()
            if len(self._threads) >= _CLIENTS_MAX:
                connection.close()
                return
            thread = threading.Thread(target=self._serve_one, args=(connection,), name="x07-client", daemon=True)
            self._threads.append(start_thread(thread))
        except OSError:  # out of descriptors or threads until a client leaves
            wait_readable(self._end.fd, _NO_FDS_S)

    def _serve_one(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, msgspec.MsgspecError, ValueError):  # the client is gone, or wrong
            if is_own(connection):
                self._serve(connection)
