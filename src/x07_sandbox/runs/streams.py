"""What flows between a job and the outside: bytes that go in, and sinks that take what comes out."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import os
import stat
import unicodedata
from dataclasses import dataclass, field
from typing import Final

from x07_sandbox.errors import BackendError

# What a pipe that polls as writable takes without blocking (pipe(7): at least one page).
_SAFE_WRITE: Final = 4096
_ROOM: Final = "Free space there, or set X07_VM_STATE_DIR to a larger disk"


@dataclass(frozen=True, slots=True, kw_only=True)
class InFile:
    """A file that goes into the guest.

    path: where it lies there. kind: "file", or "archive" to be unpacked there.
    fd: open for reading, lent; read from offset 0, so that one descriptor serves several jobs.
    """

    path: str
    mode: int
    kind: str
    fd: int
    size: int


class TerminalFilter:
    """Takes control sequences out of what a terminal gets: it would act on them, whoever wrote them.

    Line ends, tabs and carriage returns pass; every other control character becomes a visible mark.
    """

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


class Sink:
    """Takes one output stream: counts, caps, keeps it in a file, and passes it on to a reader who may be slow.

    keep_fd: a file that gets everything up to the cap. live_fd: where it is streamed to as well, or None.
    Both are lent. A live reader who stalls never blocks us: `wants_write` says when to poll for it.
    """

    def __init__(self, name: str, *, keep_fd: int, live_fd: int | None, max_bytes: int) -> None:
        self.name = name
        self.total_bytes = 0
        self.overflow = False
        self.reader_gone = False
        self.reader_problem = ""
        self._keep_fd = keep_fd
        self._live_fd = live_fd
        self._max_bytes = max_bytes
        self._pending = bytearray()
        self._owed = 0  # bytes as they came that are not done with: a terminal may get more or fewer
        self._filter = TerminalFilter() if live_fd is not None and os.isatty(live_fd) else None
        self._regular = live_fd is not None and stat.S_ISREG(os.fstat(live_fd).st_mode)
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
            raise BackendError(f"cannot keep the program's {self.name}", exc.strerror or str(exc), _ROOM) from exc
        if self._live_fd is None or self.reader_gone:
            return len(data)
        self._pending += self._filter(allowed) if self._filter else allowed
        self._owed += len(allowed)
        return len(data) - len(allowed)

    @property
    def wants_write(self) -> int | None:
        """The descriptor to poll for writing, or None."""
        return self._live_fd if self._pending and not self.reader_gone else None

    def pump(self) -> int:
        """Write a little to the live reader, who polled as writable; how many bytes are done with."""
        if self._live_fd is None:
            return 0
        size = len(self._pending) if self._regular else _SAFE_WRITE
        try:
            count = os.write(self._live_fd, self._pending[:size])
        except BlockingIOError:
            return 0
        except OSError as exc:
            # Gone, or a full disk behind it: what follows is kept all the same, and the result says so.
            self.reader_gone = True
            self.reader_problem = "" if isinstance(exc, BrokenPipeError) else exc.strerror or str(exc)
            count = len(self._pending)
        del self._pending[:count]
        if self._filter and self._pending:
            return 0
        done = min(count, self._owed) if self._pending else self._owed
        self._owed -= done
        return done

    def sha256(self) -> str:
        """Digest of what was taken."""
        return self._hash.hexdigest()


@dataclass(slots=True)
class OutFile:
    """A file that comes out of the guest: written to *fd* (lent), never more than *max_bytes*, hashed on the way."""

    path: str
    fd: int
    max_bytes: int
    size: int = 0
    complete: bool = False
    _hash: hashlib._Hash = field(default_factory=hashlib.sha256)

    def take(self, data: bytes) -> bool:
        """Append; False if it would pass the bound."""
        if self.size + len(data) > self.max_bytes:
            return False
        try:
            _write_all(self.fd, data)
        except OSError as exc:
            raise BackendError("cannot keep the built program", exc.strerror or str(exc), _ROOM) from exc
        self._hash.update(data)
        self.size += len(data)
        return True

    def sha256(self) -> str:
        """Digest of what came."""
        return self._hash.hexdigest()


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


class Cancel:
    """A request to end the run: a signal handler or another thread makes it, the loop polls its descriptor."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.signal: int | None = None

    def __call__(self, signal: int = 0) -> None:
        """Ask for the end; signal: the one that we got, 0 for a request without one."""
        if self.signal is None:
            self.signal = signal
        os.eventfd_write(self.fd, 1)

    def close(self) -> None:
        """Let go of the descriptor."""
        os.close(self.fd)
