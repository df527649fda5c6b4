"""Standard streams: their repair, messages and progress on standard error, and results on standard output."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING, Final

from x07_sandbox.errors import escaped, printable
from x07_sandbox.host.waiting import Notice, Remark

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_KIB = 1024
_RETURN: Final = re.compile(rb"\r(?!\n)")
_COLOURS: Final = {"good": "32", "BAD": "1;31", "note": "33"}
_NAMES: Final = ("stdin", "stdout", "stderr")


class OutputError(OSError):
    """Standard output cannot be written. errno and strerror are those of the failed system call."""


def painted(text: str, mark: str, stream: IO[str]) -> str:
    """Return the text in the colour of "good", "BAD" or "note" if *stream* is a terminal that shows colours."""
    if mark not in _COLOURS or not stream.isatty():
        return text
    if os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb":  # https://no-color.org
        return text
    return f"\033[{_COLOURS[mark]}m{text}\033[0m"


def say(text: str, command: str = "x07", *, bad: str = "") -> None:
    """Print one line to standard error, if possible. bad: the start of the text, which a terminal shows in red."""
    line, head = f"{command}: {printable(text)}", f"{command}: {printable(bad)}"
    if bad and line.startswith(head):
        line = painted(head, "BAD", sys.stderr) + line[len(head) :]
    _print(line)


def _print(line: str, end: str = "\n") -> None:
    with contextlib.suppress(OSError):
        print(line, end=end, file=sys.stderr, flush=True)


def show(line: str, mark: str = "") -> None:
    """Print one line of a result, after a coloured *mark*. Raises OutputError."""
    text = escaped(line)
    if mark:
        text = f"{painted(mark, mark, sys.stdout)}{' ' * (6 - len(mark))}{text}"
    write_stdout(text.encode() + b"\n")


def show_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """Print a table with aligned columns. Raises OutputError."""
    rows = [head, *([escaped(cell) for cell in line] for line in lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head) - 1)]
    for row in rows:
        show("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[-1]]).rstrip())


def size(count: int) -> str:
    """Return a number of bytes with a unit: "1.5 MiB"."""
    amount, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < _KIB:
            break
        amount, unit = amount / _KIB, larger
    return f"{amount:.0f} {unit}" if unit == "bytes" else f"{amount:.1f} {unit}"


def span(seconds: float) -> str:
    """Return a duration in its two largest units, such as "1h5m"."""
    sign, whole = "-" if seconds < 0 else "", int(abs(seconds))
    for unit, smaller, letter, smaller_letter in ((86_400, 3600, "d", "h"), (3600, 60, "h", "m"), (60, 1, "m", "s")):
        if whole >= unit:
            return f"{sign}{whole // unit}{letter}{whole % unit // smaller}{smaller_letter}"
    return f"{sign}{whole}s"


def write_stdout(data: bytes) -> None:
    """Flush earlier output, then write *data* to standard output. Raises OutputError."""
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except OSError as exc:
        raise OutputError(exc.errno, exc.strerror) from exc


def print_bytes(data: bytes) -> None:
    """Write *data* (whole lines) to standard output, without control sequences on a terminal. Raises OSError."""
    if sys.stdout.isatty():
        from x07_sandbox.sessions.transfers import TerminalFilter

        # Users read a patch to judge it. A carriage return would hide the text before it.
        data = _RETURN.sub(rb"\\r", TerminalFilter()(data))
    write_stdout(data)


class LiveLine:
    """A status line on a terminal. Without a terminal, each `Notice` is printed as a line; other text is dropped."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._shown = False

    def __call__(self, text: str) -> None:
        """Replace the line with *text*; an empty text clears it."""
        stays = isinstance(text, Remark)
        if self._live and (text or self._shown):
            self._shown = bool(text) and not stays
            _print(f"\r\033[K{f'x07: {escaped(text)}' if text else ''}", end="\n" if stays else "")
        elif not self._live and isinstance(text, Notice):
            say(text)


class Progress:
    """Printer of progress lines with the elapsed time. On a terminal, each line replaces the previous line."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._start_s = time.monotonic()
        self._live = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        """Print the current step."""
        line = f"x07: {escaped(self._title)}: [{time.monotonic() - self._start_s:5.1f} s] {escaped(text)}"
        if self._live:
            _print(f"\r\033[K{line}", end="\n" if isinstance(text, Remark) else "")
        else:
            _print(line)

    def done(self, text: str) -> None:
        """Print *text* as the last progress line."""
        self(text)
        if self._live:
            _print("")


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
    """Set up the standard streams and the umask of this process."""
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
