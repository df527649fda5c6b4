"""Repair of our own standard streams, which the caller may have closed or made non-blocking."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import sys
from typing import IO, TYPE_CHECKING, Final, NoReturn

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_NAMES: Final = ("stdin", "stdout", "stderr")
_OBJECTS: Final = 50_000  # a run makes about half as many, nearly all of them in modules, which stay


class _RetryingFile(io.FileIO):
    """A descriptor to write to, blocking or not.

    A process that shares it may have set O_NONBLOCK (node does): Python's own streams then drop what does not fit at
    once. If the reader is gone (`| head -1`), the rest is discarded.
    """

    def write(self, data: ReadableBuffer, /) -> int:
        """Write some of *data* and return how many bytes need no further write. Raises OSError."""
        while True:
            try:
                count: int | None = super().write(data)
            except BrokenPipeError:
                return memoryview(data).nbytes
            if count is not None:
                return count
            from x07_sandbox.host.poll import wait_writable  # seldom needed

            wait_writable(self.fileno())


def prepare_streams() -> None:
    """Prepare the process: garbage collection, standard streams, umask."""
    gc.set_threshold(_OBJECTS, *gc.get_threshold()[1:])  # a run makes no cycles; searching for them takes 4 ms
    _open_closed_streams()
    _retry_writes()
    os.umask(os.umask(0o077) & 0o077)  # a umask without our own rights would lock us out of our files


def _open_closed_streams() -> None:
    """Open /dev/null where a standard descriptor is closed: else the next file that we open would receive output."""
    for fd, name in enumerate(_NAMES):
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != fd:
                os.dup2(opened, fd)
                os.close(opened)
        if getattr(sys, name) is None:
            stream: IO[str] = open(fd, "r" if fd == 0 else "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


def _retry_writes() -> None:
    """Make sys.stdout and sys.stderr write everything, or raise an error."""
    for name in _NAMES[1:]:
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__") and stream is not None:  # else a test has replaced it
            raw = _RetryingFile(stream.fileno(), "w", closefd=False)
            text = io.TextIOWrapper(
                io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=stream.line_buffering
            )
            setattr(sys, name, text)


def exit_with(code: int) -> NoReturn:
    """End the process with that code. Python's own exit flushes again, and turns a full disk into exit code 120."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
