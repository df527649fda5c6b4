"""The command `x07`: as the words that start it in a process of its own, or carried out in this process."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from typing import IO, TYPE_CHECKING, Final, NamedTuple

import pytest

from x07_sandbox.cli.main import main

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path


X07: Final = [sys.executable, "-m", "x07_sandbox.cli.main"]


class Done(NamedTuple):
    """A command that has ended: its exit code, standard output and standard error."""

    code: int
    out: bytes
    err: str


def x07(
    where: Path,
    *words: str,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    command: Callable[[Sequence[str]], int] = main,
) -> Done:
    """Carry out a command in *where*, with more variables, without the start of another Python."""
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.chdir(where)
        for name, value in (env or {}).items():
            patch.setenv(name, value)
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
        files[0].write(stdin)
        files[0].seek(0)
        for number, (name, file) in enumerate(zip(("stdin", "stdout", "stderr"), files, strict=True)):
            _replace(number, file, stack)
            stream = stack.enter_context(os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))
            patch.setattr(sys, name, stream)
        try:
            code = command(words)
        except SystemExit as exc:  # after --help
            code = int(exc.code or 0)
        sys.stdout.flush()
        sys.stderr.flush()
        out, err = (os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0) for file in files[1:])
    return Done(code, out, err.decode())


def _replace(fd: int, file: IO[bytes], stack: contextlib.ExitStack) -> None:
    """Have a standard stream lead to a file until the end of *stack*."""
    kept = os.dup(fd)
    stack.callback(os.close, kept)
    stack.callback(os.dup2, kept, fd)
    os.dup2(file.fileno(), fd)
