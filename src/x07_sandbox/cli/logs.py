"""`x07 logs`: print a run's output, or the log of its connections."""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from x07_sandbox.cli.changes_text import print_bytes
from x07_sandbox.cli.console import say, write_stdout
from x07_sandbox.cli.jobs import named_run
from x07_sandbox.cli.parser import nonempty, switch
from x07_sandbox.errors import Command, UsageError
from x07_sandbox.host.locks import is_locked
from x07_sandbox.records.runs import NET_LOG, find_run, run_folder
from x07_sandbox.sessions.transfers import TerminalFilter

_EPILOG: Final = """x07 logs prints the program's standard output to standard output, and its standard error to
standard error. On a terminal, x07 logs replaces control characters, except line ends and tabs.

With --net, x07 logs prints one JSON object per line. Its keys include event (open, closed, denied or failed), host,
port, rule, and ms (milliseconds since the start).

examples:
  x07 logs
  x07 logs --follow 1764273600000-4711-0
  x07 logs --build
  x07 logs --net | jq -c 'select(.event == "denied")'
"""
_CHUNK: Final = 1 << 16
_LOOK_AGAIN_S: Final = 0.05


def add_logs(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `x07 logs`."""
    parser.epilog = _EPILOG
    doc = "the run's id, or its first characters (default: the latest run that has the requested log)"
    parser.add_argument("run", nargs="?", type=nonempty, metavar="RUN", help=doc)
    which = parser.add_mutually_exclusive_group()
    switch(which, "--build", "print the output of the build instead")
    switch(which, "--net", "print the log of connections instead")
    switch(parser, "--follow", "keep printing until the run ends")
    parser.set_defaults(carry_out=_logs)


def _logs(options: argparse.Namespace) -> int:
    if options.net:
        if options.follow:
            raise UsageError("wrong usage", "--net and --follow cannot be combined", "Omit --follow")
        return _net(options)
    prefix = "build-" if options.build else ""
    folder = _folder(options, f"{prefix}stdout")
    streams = [_Stream(folder / f"{prefix}stdout", 1, write_stdout), _Stream(folder / f"{prefix}stderr", 2, _put_error)]
    with contextlib.ExitStack() as stack:
        for stream in streams:
            stack.callback(stream.close)
        live = True
        while live:
            live = options.follow and is_locked(folder)  # checked first, so that the last output is read below
            for stream in streams:
                stream.pass_on()
            if live:
                time.sleep(_LOOK_AGAIN_S)
    return 0


def _folder(options: argparse.Namespace, holds: str) -> Path:
    """Return the folder of the run RUN, or of the latest run that has the file *holds*. Raises UsageError."""
    if options.run is None:
        return find_run(None, holds, "output to print", "First run a program", action="any output")
    folder = run_folder(named_run(options.run))
    if not folder.is_dir() or not (options.follow or (folder / holds).is_file()):
        why = f"run {folder.name} has no such output"
        raise UsageError("cannot print the output", why, ("See what it has: ", Command(f"x07 inspect {folder.name}")))
    return folder


class _Stream:
    """A growing file of a run's output, which may not exist yet."""

    def __init__(self, path: Path, target: int, write: Callable[[bytes], None]) -> None:
        self._path, self._write = path, write
        self._filter: Callable[[bytes], bytes] = TerminalFilter() if os.isatty(target) else bytes
        self._fd: int | None = None

    def pass_on(self) -> None:
        """Write the bytes that were added to the file since the last call. Raises OSError."""
        if self._fd is None:
            with contextlib.suppress(FileNotFoundError):
                self._fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        while self._fd is not None and (chunk := os.read(self._fd, _CHUNK)):
            self._write(self._filter(chunk))

    def close(self) -> None:
        """Close the file."""
        if self._fd is not None:
            os.close(self._fd)


def _put_error(data: bytes) -> None:
    with contextlib.suppress(OSError):  # as for every message
        sys.stderr.flush()
        sys.stderr.buffer.write(data)
        sys.stderr.buffer.flush()


def _net(options: argparse.Namespace) -> int:
    folder = find_run(options.run, NET_LOG, "a log of connections", "Run a program with --allow-host", action="one")
    say(f"connections of run {folder.name}")
    with (folder / NET_LOG).open("rb") as file:
        while chunk := file.read(_CHUNK):
            print_bytes(chunk)
    return 0
