"""Our own process and its standard streams: whoever starts us may have closed any of them, or set what is not ours."""

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
_OBJECTS: Final = 50_000  # a run makes about half as many on its way, nearly all of them modules, which stay


class _Patient(io.FileIO):
    """What we write to, however it came to us.

    Whoever shares it may have set O_NONBLOCK (node does): Python's own streams then drop what does not fit at once. And
    a reader who has gone (`| head -1`) wanted no more.
    """

    def write(self, data: ReadableBuffer, /) -> int:
        """Write some of *data*; how many bytes are done with. Raises OSError."""
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
    """What each of our commands does first."""
    gc.set_threshold(_OBJECTS, *gc.get_threshold()[1:])  # a run makes no cycles, and looking for them takes 4 ms
    _fill_closed_streams()
    _write_patiently()
    os.umask(os.umask(0o077) & 0o077)  # one that takes our own rights away would lock us out of our files


def _fill_closed_streams() -> None:
    """Put /dev/null where a standard descriptor is closed, before any descriptor of ours can take its number.

    Else a program's output would be written into whatever of ours had become descriptor 1.
    """
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


def _write_patiently() -> None:
    """Have all that we say arrive whole, or be told of as an error, whatever is behind our streams."""
    for name in _NAMES[1:]:
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__") and stream is not None:  # else it is somebody's own, as in a test
            raw = _Patient(stream.fileno(), "w", closefd=False)
            text = io.TextIOWrapper(
                io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=stream.line_buffering
            )
            setattr(sys, name, text)


def leave(code: int) -> NoReturn:
    """End the process with exactly that code.

    Python's own end would flush both streams once more, and turn a full disk behind them into exit code 120.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
