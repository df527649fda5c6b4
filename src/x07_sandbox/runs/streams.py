"""What flows between a job and the outside: bytes that go in, and sinks that take what comes out."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import os
import threading
import unicodedata
from typing import Final

import msgspec

from x07_sandbox.errors import BackendError
from x07_sandbox.host.poll import wait_readable, wait_writable
from x07_sandbox.host.threads import start_thread

_CHUNK: Final = 64 * 1024
ROOM: Final = "Free space there, or set X07_VM_STATE_DIR to a larger disk"


class InFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file that goes into the guest.

    path: where it lies there. kind: "file", "archive" to be unpacked there, or "tree" (channel/trees).
    fd: open for reading, lent; read from offset 0, so that one descriptor serves several jobs.
    """

    path: str
    mode: int
    kind: str
    fd: int
    size: int


class TerminalFilter:
    """Replaces control characters, on which a terminal would act, but for line ends, tabs and carriage returns."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode

    def __call__(self, data: bytes) -> bytes:
        """What the terminal gets for *data*; a character may be cut anywhere between two calls."""
        return "".join(
            char
            if char in "\n\t\r" or unicodedata.category(char) not in {"Cc", "Cf", "Cs"}
            else "\N{REPLACEMENT CHARACTER}"
            for char in self._decode(data)
        ).encode()


class _Writer:
    """Writes to a lent descriptor in a thread of its own, so that its reader stalls nothing else.

    Polling before each write would not do: another writer may fill the same pipe in between, and a terminal may expand
    what it gets. O_NONBLOCK is shared with others and stays. progress_fd: readable when something was written or lost.
    """

    def __init__(self, fd: int) -> None:
        self.problem: OSError | None = None
        self.progress_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._fd = fd
        self._queue = bytearray()
        self._written = 0
        self._changed = threading.Condition()
        self._closed = False
        # A daemon: a reader who never reads again must not hold the process.
        self._thread = start_thread(threading.Thread(target=self._serve, name="x07-output", daemon=True))

    def put(self, data: bytes) -> None:
        """Queue bytes."""
        with self._changed:
            self._queue += data
            self._changed.notify()

    def take_written(self) -> tuple[int, int]:
        """(bytes written since the last call, bytes still queued)."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.progress_fd)
        with self._changed:
            count, self._written = self._written, 0
            return count, len(self._queue)

    def close(self) -> None:
        """Let the thread end once it has nothing to write; wait for that only if it has nothing now."""
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
                        os.close(self.progress_fd)
                        return
                    self._changed.wait()
                chunk = bytes(self._queue[:_CHUNK])
            try:
                count = os.write(self._fd, chunk)
            except BlockingIOError:  # it was given to us with O_NONBLOCK
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
            os.eventfd_write(self.progress_fd, 1)


class Sink:
    """Takes one output stream: counts, caps, keeps it in a file, and passes it on to a reader who may be slow.

    keep_fd: a file that gets everything up to the cap. live_fd: where it is streamed as well, or None. Both are lent.
    raw: a terminal gets the bytes as they are. `progress_fd` says when the live reader, who never blocks us, took some.
    """

    def __init__(self, name: str, *, keep_fd: int, live_fd: int | None, max_bytes: int, raw: bool = False) -> None:
        self.name = name
        self.total_bytes = 0
        self.overflow = False
        self.reader_gone = False
        self.reader_problem = ""
        self._keep_fd = keep_fd
        self._live_fd = live_fd
        self._max_bytes = max_bytes
        self._writer: _Writer | None = None
        self._owed = 0  # bytes as they came that are not done with: a terminal may get more or fewer
        self._filter = TerminalFilter() if live_fd is not None and not raw and os.isatty(live_fd) else None
        self._hash = hashlib.sha256()

    def take(self, data: bytes) -> int:
        """Take bytes; how many of them are done with at once. The rest is done when `pump` says so. Raises OSError."""
        allowed = data[: self._max_bytes - self.total_bytes]
        self.overflow = self.overflow or len(allowed) < len(data)
        self.total_bytes += len(allowed)
        self._hash.update(allowed)
        try:
            _write_all(self._keep_fd, allowed)
        except OSError as exc:
            raise BackendError(f"cannot keep the program's {self.name}", exc.strerror or str(exc), ROOM) from exc
        if self._live_fd is None or self.reader_gone or not allowed:
            return len(data)
        if self._writer is None:
            self._writer = _Writer(self._live_fd)
        self._owed += len(allowed)
        self._writer.put(self._filter(allowed) if self._filter else allowed)
        return len(data) - len(allowed)

    @property
    def progress_fd(self) -> int | None:
        """The descriptor to poll for reading while something is on its way to the live reader, or None."""
        return self._writer.progress_fd if self._writer is not None and self._owed else None

    def pump(self) -> int:
        """How many bytes the live reader has taken, or never will, since the last call."""
        if self._writer is None:
            return 0
        written, queued = self._writer.take_written()
        problem = self._writer.problem
        if problem is not None:
            # Gone, or a full disk behind it: what follows is kept all the same, and the result says so.
            self.reader_gone = True
            self.reader_problem = "" if isinstance(problem, BrokenPipeError) else problem.strerror or str(problem)
        done = self._owed if not queued else 0 if self._filter else min(written, self._owed)
        self._owed -= done
        return done

    def close(self) -> None:
        """Nothing more comes. What is still on its way goes on without anybody waiting for it."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def sha256(self) -> str:
        """Digest of what was taken."""
        return self._hash.hexdigest()


class OutFile(msgspec.Struct):
    """A file that comes out of the guest: written to *fd* (lent), never more than *max_bytes*, hashed on the way."""

    path: str
    fd: int
    max_bytes: int
    size: int = 0
    complete: bool = False
    _hash: hashlib._Hash = msgspec.field(default_factory=hashlib.sha256)

    def take(self, data: bytes) -> bool:
        """Append; False if it would pass the bound."""
        if self.size + len(data) > self.max_bytes:
            return False
        try:
            _write_all(self.fd, data)
        except OSError as exc:
            raise BackendError("cannot keep the built program", exc.strerror or str(exc), ROOM) from exc
        self._hash.update(data)
        self.size += len(data)
        return True

    def sha256(self) -> str:
        """Digest of what came."""
        return self._hash.hexdigest()

    def clear(self) -> None:
        """Back to nothing."""
        os.ftruncate(self.fd, 0)
        os.lseek(self.fd, 0, os.SEEK_SET)
        self.size, self.complete, self._hash = 0, False, hashlib.sha256()


def read_all(fd: int, most: int) -> bytes:
    """Read *fd* to its end, or until it is more than *most* bytes; O_NONBLOCK does not end it. Raises OSError."""
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
    """A file in memory that holds *data*, at its beginning; *stack* closes it."""
    fd = os.memfd_create("x07", os.MFD_CLOEXEC)
    stack.callback(os.close, fd)
    _write_all(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
