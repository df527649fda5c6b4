"""What we say to people: on standard error, never mixed into a program's output."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import IO, Final

from x07_sandbox.errors import printable
from x07_sandbox.host.cancel import Notice

_KIB = 1024
_COLOURS: Final = {"good": "32", "BAD": "1;31", "note": "33"}


class OutputError(OSError):
    """Standard output does not take what we print: the reason is the system's, whichever it is, and no bug of ours."""


def plain(text: str) -> str:
    """Text of a guest, of more lines, without control characters but line ends and tabs."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


def painted(text: str, mark: str, stream: IO[str]) -> str:
    """The text in the colour of "good", "BAD" or "note" where *stream* is a terminal that wants colour."""
    if mark not in _COLOURS or not stream.isatty():
        return text
    if os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb":  # https://no-color.org
        return text
    return f"\033[{_COLOURS[mark]}m{text}\033[0m"


def say(text: str, command: str = "x07", *, bad: str = "") -> None:
    """One line to the user; one who cannot be told (a full disk, a closed pipe) still gets the exit code.

    bad: how the text begins where it tells of a failure; a terminal shows that in red.
    """
    line, head = f"{command}: {printable(text)}", f"{command}: {printable(bad)}"
    if bad and line.startswith(head):
        line = painted(head, "BAD", sys.stderr) + line[len(head) :]
    _print(line)


def _print(line: str, end: str = "\n") -> None:
    with contextlib.suppress(OSError):
        print(line, end=end, file=sys.stderr, flush=True)


def show(line: str, mark: str = "") -> None:
    """One line of a result on standard output; a name that is no UTF-8 keeps its bytes. Raises OutputError.

    mark: "good", "BAD" or "note", which the line then begins with, in its colour.
    """
    text = "".join(char if "\udc80" <= char <= "\udcff" else printable(char) for char in line)
    if mark:
        text = f"{painted(mark, mark, sys.stdout)}{' ' * (6 - len(mark))}{text}"
    write_stdout(text.encode("utf-8", "surrogateescape") + b"\n")


def size(count: int) -> str:
    """A number of bytes for people."""
    amount, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < _KIB:
            break
        amount, unit = amount / _KIB, larger
    return f"{amount:.0f} {unit}" if unit == "bytes" else f"{amount:.1f} {unit}"


def write_stdout(data: bytes) -> None:
    """*data* on standard output, behind what was printed there before. Raises OutputError."""
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except OSError as exc:
        raise OutputError(exc.errno, exc.strerror) from exc


class LiveLine:
    """One line on a terminal about what takes long; it goes away again. Elsewhere only notices, each in a line."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._shown = False

    def __call__(self, text: str) -> None:
        """Show *text* in place of what was shown; an empty text clears the line."""
        if self._live and (text or self._shown):
            self._shown = bool(text)
            _print(f"\r\033[K{f'x07: {printable(text)}' if text else ''}", end="")
        elif not self._live and isinstance(text, Notice):
            say(text)


class Progress:
    """Lines of progress with the time that has passed; on a terminal the last one stays on one line."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._begun = time.monotonic()
        self._live = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        """Say what is being done now."""
        line = f"x07: {printable(self._title)}: [{time.monotonic() - self._begun:5.1f} s] {printable(text)}"
        if self._live:
            _print(f"\r\033[K{line}", end="")
        else:
            _print(line)

    def done(self, text: str) -> None:
        """The last line."""
        self(text)
        if self._live:
            _print("")
