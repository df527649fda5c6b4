"""Repair of this process's standard streams, which the parent process may have closed or made non-blocking."""

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
    """A file object that writes all data to a descriptor, even if the descriptor is non-blocking.

    Another process that shares the descriptor may have set O_NONBLOCK (node does). Python's own streams then lose the
    bytes that do not fit at once. If no process reads from a pipe any more (`| head -1`), output to it is discarded.
    """

    def write(self, data: ReadableBuffer, /) -> int:
        """Write some of *data*, and return how many bytes were written or discarded. Raises OSError."""
        while True:
            try:
                count: int | None = super().write(data)
            except BrokenPipeError:
                return memoryview(data).nbytes
            if count is not None:
                return count
            from x07_sandbox.host.waiting import wait_writable  # seldom needed

            wait_writable(self.fileno())


def prepare_streams() -> None:
    """Set up the garbage collection, the standard streams and the umask of this process."""
    gc.set_threshold(_OBJECTS, *gc.get_threshold()[1:])  # a run makes no cycles; searching for them takes 4 ms
    _open_closed_streams()
    _retry_writes()
    os.umask(os.umask(0o077) & 0o077)  # a umask without our own rights would lock us out of our files


def _open_closed_streams() -> None:
    """Open /dev/null for each closed standard descriptor. Otherwise the next opened file would receive our output."""
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
    """Flush the output and end the process with *code*. Python's own exit would turn a full disk into exit code 120."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
