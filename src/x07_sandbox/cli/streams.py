"""Our own standard streams: whoever starts us may have closed any of them."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import IO, Final, NoReturn

_NAMES: Final = ("stdin", "stdout", "stderr")


def fill_closed_streams() -> None:
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


def keep_own_rights() -> None:
    """Have what we make be ours to use: a umask that takes its owner's rights away would lock us out of our files."""
    os.umask(os.umask(0o077) & 0o077)


def leave(code: int) -> NoReturn:
    """End the process with exactly that code.

    Python's own end would flush both streams once more, and turn a full disk behind them into exit code 120.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
