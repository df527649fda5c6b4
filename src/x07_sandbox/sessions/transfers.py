"""Streams of a job: files that go into the guest, and sinks that take the guest's output."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import os
import sys
import threading
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from x07_sandbox.channel import messages
from x07_sandbox.channel.messages import Close, Left
from x07_sandbox.errors import BackendError, HostError, escaped
from x07_sandbox.host import linux, paths, start_thread
from x07_sandbox.host.locks import lock_shared
from x07_sandbox.host.paths import open_private_file, private_dir
from x07_sandbox.host.processes import close_on_fork
from x07_sandbox.host.waiting import Event, wait_readable, wait_writable, write_all
from x07_sandbox.records.runs import KILL, all_runs
from x07_sandbox.sessions.result import Output, output_with

if TYPE_CHECKING:
    from x07_sandbox.host.waiting import Cancel

_CHUNK: Final = 64 * 1024
BACKLOG_BYTES: Final = 1 << 20
TAIL_BYTES: Final = 32 * 1024  # of each output stream of a failed command, for hints
ROOM: Final = "Free disk space, or set X07_VM_STATE_DIR to a folder on a larger disk"


class InFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file to copy to *path* in the guest. kind: "file" or "tree" (channel/trees).

    fd: a descriptor that the caller owns. x07 reads the file from offset 0, so several jobs can use one descriptor.
    """

    path: str
    mode: int
    kind: str
    fd: int
    size: int


class TerminalFilter:
    """Filter that escapes all control characters that a terminal obeys, except line feed, tab and carriage return.

    Other characters that cannot be seen in a name, such as blanks of some languages, are ordinary in output.
    """

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape").decode

    def __call__(self, data: bytes) -> bytes:
        """Return the filtered *data*. A character may be split between two calls."""
        return "".join(
            char if char in "\n\t\r" or unicodedata.category(char) not in {"Cc", "Cf", "Cs"} else escaped(char)
            for char in self._decode(data)
        ).encode()


class _Writer:
    """Writer to a descriptor. It uses a thread, because a write may block even when the descriptor is ready.

    O_NONBLOCK is not set, because other processes share that flag. progress_fd: readable after a write or an error.
    """

    def __init__(self, fd: int) -> None:
        self.problem: OSError | None = None
        self._progress = Event()
        self.progress_fd = self._progress.fd
        self._fd = fd
        self._queue = bytearray()
        self._written = 0
        self._changed = threading.Condition()
        self._closed = False
        # A daemon thread, so that a reader that stopped reading does not keep this process alive.
        self._thread = start_thread(threading.Thread(target=self._serve, name="x07-output", daemon=True))

    def put(self, data: bytes) -> None:
        """Queue *data* for writing."""
        with self._changed:
            self._queue += data
            self._changed.notify()

    def take_written(self) -> tuple[int, int]:
        """Return (bytes written since the last call, bytes still queued)."""
        self._progress.clear()
        with self._changed:
            count, self._written = self._written, 0
            return count, len(self._queue)

    def close(self) -> None:
        """End the thread once its queue is empty. Wait for the thread only if the queue is empty now."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            idle = not self._queue
        if idle:
            self._thread.join()

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._queue:
                    if self._closed:
                        self._progress.close()
                        return
                    self._changed.wait()
                chunk = bytes(self._queue[:_CHUNK])
            try:
                count = os.write(self._fd, chunk)
            except BlockingIOError:  # the descriptor has O_NONBLOCK
                wait_writable(self._fd)
                continue
            except OSError as exc:
                with self._changed:
                    self.problem = exc
                    self._written += len(self._queue)
                    self._queue.clear()
            else:
                with self._changed:
                    self._written += count
                    del self._queue[:count]
            self._progress.set()


class Sink:
    """Sink for one output stream, up to *max_bytes*. It stores the stream in *keep_fd* and copies it to *live_fd*.

    The caller owns both descriptors, which may be None. The reader of *live_fd* may be slow. `progress_fd` becomes
    readable after a write to *live_fd*. raw: do not filter the output for a terminal.
    """

    def __init__(
        self, name: str, *, keep_fd: int | None, live_fd: int | None, max_bytes: int, raw: bool = False
    ) -> None:
        self.name = name
        self.total_bytes = 0
        self.overflow = False
        self.reader_gone = False
        self.reader_problem = ""
        self._keep_fd = keep_fd
        self._live_fd = live_fd
        self.max_bytes = max_bytes
        self._writer: _Writer | None = None
        self._owed = 0  # incoming bytes not yet written live; filtering may change their number
        self._filter = TerminalFilter() if live_fd is not None and not raw and os.isatty(live_fd) else None
        self._hash = hashlib.sha256()

    def take_no_more(self) -> int:
        """Do nothing, and return 0: all that arrives is taken in any case."""
        return 0

    def take(self, data: bytes) -> int:
        """Store *data* and queue it for *live_fd*. Raises BackendError.

        Return how many bytes are finished. `pump` counts the queued bytes once they are finished.
        """
        allowed = data[: self.max_bytes - self.total_bytes]
        self.overflow = self.overflow or len(allowed) < len(data)
        self.total_bytes += len(allowed)
        self._hash.update(allowed)
        try:
            if self._keep_fd is not None:
                write_all(self._keep_fd, allowed)
        except OSError as exc:
            raise BackendError(f"cannot store the program's {self.name}", exc.strerror or str(exc), ROOM) from exc
        if self._live_fd is None or self.reader_gone or not allowed:
            return len(data)
        if self._writer is None:
            self._writer = _Writer(self._live_fd)
        self._owed += len(allowed)
        self._writer.put(self._filter(allowed) if self._filter else allowed)
        return len(data) - len(allowed)

    @property
    def progress_fd(self) -> int | None:
        """The descriptor that becomes readable after a write to *live_fd*, or None if no bytes are queued."""
        return self._writer.progress_fd if self._writer is not None and self._owed else None

    def pump(self) -> int:
        """Return how many queued bytes were written to *live_fd*, or dropped, since the last call."""
        if self._writer is None:
            return 0
        written, queued = self._writer.take_written()
        problem = self._writer.problem
        if problem is not None:
            # The reader is gone or its disk is full. The output is still stored, and the result reports the problem.
            self.reader_gone = True
            self.reader_problem = "" if isinstance(problem, BrokenPipeError) else problem.strerror or str(problem)
        done = self._owed if not queued else 0 if self._filter else min(written, self._owed)
        self._owed -= done
        return done

    def close(self) -> None:
        """Close the sink without waiting for bytes that are still being written."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def sha256(self) -> str:
        """Return the digest of all stored bytes."""
        return self._hash.hexdigest()


class Inbox(Sink):
    """Sink that keeps one output stream in memory until `pull`. Until then the guest sends no more than one window."""

    backlog: Backlog | None = None  # for streams that several readers may read

    def __init__(self, name: str) -> None:
        super().__init__(name, keep_fd=None, live_fd=None, max_bytes=sys.maxsize)
        self._data = bytearray()
        self._full = False
        self.tail = b""  # the last TAIL_BYTES of all that has arrived

    def take(self, data: bytes) -> int:
        """Keep *data*. Return 0, since nothing was read yet; after `take_no_more`, drop it."""
        self.tail = (self.tail + data)[-TAIL_BYTES:]
        if self._full:
            return len(data)
        self._data += data
        return 0

    @property
    def size(self) -> int:
        """How many bytes have arrived that `pull` has not returned."""
        return len(self._data)

    @property
    def waiting(self) -> bool:
        """Whether something has arrived that `pull` has not returned."""
        return bool(self._data)

    def take_no_more(self) -> int:
        """Drop what arrives from now on. Return the number of bytes that the guest may send for those in memory."""
        already, self._full = self._full, True
        return 0 if already else len(self._data)

    def pull(self) -> tuple[bytes, int]:
        """Remove and return what has arrived, and for how many bytes of it the guest may send more."""
        data = bytes(self._data)
        self._data.clear()
        return data, 0 if self._full else len(data)


class Backlog(Inbox):
    """Inbox of a detached command: the end of one output stream, for several readers. The command never waits."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.backlog = self
        self._lock = threading.Lock()  # readers have threads of their own
        self._start = 0  # of what is kept, in the stream

    def take(self, data: bytes) -> int:
        """Keep *data*, and drop what is too much from the beginning. Return how many bytes are finished: all."""
        with self._lock:
            self.tail = (self.tail + data)[-TAIL_BYTES:]
            self._data += data
            dropped = max(0, len(self._data) - BACKLOG_BYTES)
            del self._data[:dropped]
            self._start += dropped
        return len(data)

    def take_no_more(self) -> int:
        """Return 0, since what has arrived was counted then."""
        return 0

    @property
    def end(self) -> int:
        """The position of the end of what has arrived."""
        return self._start + len(self._data)

    def since(self, at: int) -> tuple[bytes, int]:
        """Return what is kept of the stream from position *at* on, and the position of its end."""
        with self._lock:
            return bytes(self._data[max(0, at - self._start) :]), self.end


class OutFile(msgspec.Struct):
    """A file that comes out of the guest: at most *max_bytes*, written to *fd* and hashed. The caller owns *fd*."""

    path: str
    fd: int
    max_bytes: int
    size: int = 0
    complete: bool = False
    _hash: hashlib._Hash = msgspec.field(default_factory=hashlib.sha256)

    def take(self, data: bytes) -> bool:
        """Append *data*. Return False, and append nothing, if the file would exceed the limit. Raises BackendError."""
        if self.size + len(data) > self.max_bytes:
            return False
        try:
            write_all(self.fd, data)
        except OSError as exc:
            raise BackendError("cannot store the built program", exc.strerror or str(exc), ROOM) from exc
        self._hash.update(data)
        self.size += len(data)
        return True

    def sha256(self) -> str:
        """Return the digest of the content."""
        return self._hash.hexdigest()

    def clear(self) -> None:
        """Remove the content."""
        os.ftruncate(self.fd, 0)
        os.lseek(self.fd, 0, os.SEEK_SET)
        self.size, self.complete, self._hash = 0, False, hashlib.sha256()


class CommandStreams(msgspec.Struct, frozen=True, kw_only=True):
    """The standard streams of a command, which the caller owns. on_started: called once the command runs.

    stdin_fd: read for the input. open_input: whether `Execution.write` gives the input instead.
    """

    stdin_fd: int | None
    stdout: Sink
    stderr: Sink
    open_input: bool = False
    on_started: Callable[[], object] = lambda: None


def kept_streams(kind: type[Inbox] = Inbox, *, open_input: bool = True) -> CommandStreams:
    """Return streams of which the output is kept in memory. open_input: see `CommandStreams`."""
    return CommandStreams(stdin_fd=None, stdout=kind("stdout"), stderr=kind("stderr"), open_input=open_input)


class Receivers(msgspec.Struct, frozen=True, kw_only=True):
    """The receivers of what the guest sends when a session closes; None for what is not wanted.

    is_tree: whether the output is a folder in the guest. changes: a files/incoming.Incoming that takes changes to the
    trees. left: a sessions/private_files.LeftFiles that takes files of the private folders. left_wanted: which of these
    are sent or counted.
    """

    output: OutFile | None = None
    is_tree: bool = False
    changes: Any = None
    left: Any = None
    left_wanted: Left | None = None

    def closing(self, after: int = 0) -> Close:
        """Return the message that closes a session once the command *after* has ended; 0 for at once."""
        out = self.output
        return Close(
            after, None if out is None else messages.Output(out.path, out.max_bytes, self.is_tree), self.left_wanted
        )


class Unwanted:
    """Receiver that refuses what the guest sends."""

    def take(self, data: bytes) -> bool:  # noqa: ARG002 - as the receivers have it
        """Return False."""
        return False


def read_all(fd: int, most: int) -> bytes:
    """Read *fd*, blocking or not, to its end or until more than *most* bytes are read. Raises OSError."""
    data = bytearray()
    while len(data) <= most:
        try:
            piece = os.read(fd, 1 << 20)
        except BlockingIOError:
            wait_readable(fd)
            continue
        if not piece:
            break
        data += piece
    return bytes(data)


def memory_file(data: bytes, stack: contextlib.ExitStack) -> int:
    """Return a file in memory with the content *data*, at offset 0. *stack* closes it."""
    fd = linux.memory_file(data)
    stack.callback(os.close, fd)
    return fd


class RunFolder:
    """The folder `runs/RUN/`, locked while the run is in progress."""

    def __init__(self, run_id: str, stack: contextlib.ExitStack) -> None:
        self.path = private_dir(all_runs() / run_id)
        self._stack = stack
        try:
            stack.callback(close_on_fork.close, lock_shared(self.path))  # keeps it from being pruned
        except OSError as exc:
            why = exc.strerror or str(exc)
            raise HostError(f"cannot use the run's folder {self.path}", why, "Start the run again") from exc

    def accept_kill(self, cancel: Cancel) -> None:
        """Let `x07 kill` cancel the run. If the disk has no named pipes, `x07 kill` ends the run's jobs instead."""
        path = self.path / KILL
        self._stack.callback(path.unlink, missing_ok=True)
        with contextlib.suppress(OSError):
            cancel.listen(path)

    def sink(self, name: str, *, live_fd: int | None, max_bytes: int, raw: bool = False) -> tuple[Sink, int]:
        """Return a sink that stores a stream in the file *name* of this folder, and the file's descriptor.

        Raises HostError.
        """
        path = self.path / name
        try:
            fd = open_private_file(path, os.O_RDWR | os.O_EXCL)
        except OSError as exc:
            raise HostError(f"cannot write {path}", exc.strerror or str(exc), ROOM) from exc
        self._stack.callback(os.close, fd)
        sink = Sink(name.rpartition("-")[2], keep_fd=fd, live_fd=live_fd, max_bytes=max_bytes, raw=raw)
        self._stack.callback(sink.close)
        return sink, fd

    def out_file(self, guest_path: str, max_bytes: int) -> OutFile:
        """Return an unnamed file that receives a file from the guest."""
        return unnamed_file(self.path, guest_path, max_bytes, self._stack)


def unnamed_file(folder: Path, guest_path: str, max_bytes: int, stack: contextlib.ExitStack) -> OutFile:
    """Create a file without a name on the disk of *folder*. *stack* closes it. Raises HostError."""
    fd = paths.unnamed_file(folder, "cannot create a temporary file")
    stack.callback(os.close, fd)
    return OutFile(path=guest_path, fd=fd, max_bytes=max_bytes)


def output_of(sink: Sink, fd: int) -> Output:
    """Return the output that a sink stored in the file *fd*, in the form that the result has."""
    data = b""
    while chunk := os.pread(fd, 1 << 20, len(data)):
        data += chunk
    return output_with(data, sink.total_bytes, truncated=sink.overflow, undelivered=sink.reader_problem or None)
