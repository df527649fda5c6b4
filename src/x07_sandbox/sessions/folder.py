"""The folder of a run, which holds everything that is stored about the run except the records of its jobs."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from x07_sandbox.errors import HostError, Text, UsageError
from x07_sandbox.host import paths
from x07_sandbox.host.locks import lock_shared
from x07_sandbox.host.paths import open_private_file, private_dir, state_dir
from x07_sandbox.records.record import state_home
from x07_sandbox.sessions.result import Output, output_with
from x07_sandbox.sessions.transfers import ROOM, OutFile, Sink

if TYPE_CHECKING:
    from x07_sandbox.host.cancel import Cancel

KILL = "kill"  # a pipe to the x07 process of the run
SANDBOX = "sandbox.json"  # the record of a sandbox (sessions/command)
SOCKET = "socket"  # of the holder of a sandbox
NET_LOG = "net.jsonl"  # of the egress gate
REQUEST = "request.json"  # identifies the run until there is a result
RUN_NAME = re.compile(r"\d{1,15}-\d{1,10}-\d{1,10}")
APPLYING = ".applying"  # a folder beside those of the runs (sessions/saved_changes)


class RunFolder:
    """The folder `runs/RUN/`, locked while the run is in progress."""

    def __init__(self, run_id: str, stack: contextlib.ExitStack) -> None:
        self.path = private_dir(all_runs() / run_id)
        self._stack = stack
        try:
            stack.callback(os.close, lock_shared(self.path))  # keeps it from being pruned
        except OSError as exc:
            why = exc.strerror or str(exc)
            raise HostError(f"cannot use the run's folder {self.path}", why, "Start the run again") from exc

    def accept_kill(self, cancel: Cancel) -> None:
        """Let `x07 kill` cancel the run. If the disk has no named pipes, `x07 kill` ends the run's jobs instead."""
        path = self.path / KILL
        self._stack.callback(path.unlink, missing_ok=True)
        with contextlib.suppress(OSError):
            cancel.listen(path)

    def sink(self, name: str, *, live_fd: int | None, max_bytes: int, raw: bool = False) -> tuple[Sink, int]:
        """Return a sink that stores a stream in the file *name* of this folder, and the file's descriptor.

        Raises HostError.
        """
        path = self.path / name
        try:
            fd = open_private_file(path, os.O_RDWR | os.O_EXCL)
        except OSError as exc:
            raise HostError(f"cannot write {path}", exc.strerror or str(exc), ROOM) from exc
        self._stack.callback(os.close, fd)
        sink = Sink(name.rpartition("-")[2], keep_fd=fd, live_fd=live_fd, max_bytes=max_bytes, raw=raw)
        self._stack.callback(sink.close)
        return sink, fd

    def out_file(self, guest_path: str, max_bytes: int) -> OutFile:
        """Return an unnamed file that receives a file from the guest."""
        return unnamed_file(self.path, guest_path, max_bytes, self._stack)


def find_run(run: str | None, file: str, what: str, fix: Text, *, action: str = "") -> Path:
    """Return the folder of the run whose id is or starts with *run* (`is_named`); None stands for the latest run.

    Only runs that have *file* count. Raises UsageError if none or several match.
    what, action, fix: parts of the error: the content of *file*, what a run that has *file* did, and the advice.
    """
    root = all_runs()
    names = [name for name in runs_with(file) if run is None or is_named(name, run)]
    if not names:
        why = f"no run{f' with {described(run)}' if run else ''} has {action or what}"
        raise UsageError(f"cannot find {what}", why, fix)
    if run is not None and len(names) > 1:
        why = f"{len(names)} run ids start with {run}, such as {names[0]}"
        raise UsageError(f"the run id {run} is ambiguous", why, "Use more digits of the id")
    return root / names[-1]


def is_named(name: str, word: str) -> bool:
    """Return whether *word* is the run id *name* or the start of it. A whole id is never the start of another one."""
    return name == word or (not RUN_NAME.fullmatch(word) and name.startswith(word))


def described(word: str) -> str:
    """Return a description of the ids that `is_named` accepts for *word*."""
    return f"the id {word}" if RUN_NAME.fullmatch(word) else f"an id that starts with {word}"


def runs_with(file: str) -> list[str]:
    """Return the ids of the runs that have *file*, oldest first."""
    root = all_runs()
    names = [path.name for path in root.iterdir() if RUN_NAME.fullmatch(path.name) and (path / file).is_file()]
    return sorted(names, key=lambda name: [int(part) for part in name.split("-")])


def all_runs() -> Path:
    """Return the folder that contains the folders of all this user's runs. Raises HostError."""
    return private_dir(runs_dir(private_dir(state_dir())))


def runs_dir(root: Path) -> Path:
    """Return the folder for all runs. It is inside the state folder *root* if other users can write to its parent."""
    home = state_home(root)
    return home / ("runs" if home != root else ".runs")


def unnamed_file(folder: Path, guest_path: str, max_bytes: int, stack: contextlib.ExitStack) -> OutFile:
    """Create a file without a name on the disk of *folder*. *stack* closes it. Raises HostError."""
    fd = paths.unnamed_file(folder, "cannot create a temporary file")
    stack.callback(os.close, fd)
    return OutFile(path=guest_path, fd=fd, max_bytes=max_bytes)


def output_of(sink: Sink, fd: int) -> Output:
    """Return the output that a sink stored in the file *fd*, in the form that the result has."""
    data = b""
    while chunk := os.pread(fd, 1 << 20, len(data)):
        data += chunk
    return output_with(data, sink.total_bytes, truncated=sink.overflow, undelivered=sink.reader_problem or None)
