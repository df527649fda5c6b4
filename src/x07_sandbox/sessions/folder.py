"""The folder of a run in progress (records/runs), and the files that receive what comes from its guest."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from x07_sandbox.errors import HostError
from x07_sandbox.host import paths
from x07_sandbox.host.locks import lock_shared
from x07_sandbox.host.paths import open_private_file, private_dir
from x07_sandbox.records.runs import KILL, all_runs
from x07_sandbox.sessions.result import Output, output_with
from x07_sandbox.sessions.transfers import ROOM, OutFile, Sink

if TYPE_CHECKING:
    from x07_sandbox.host.waiting import Cancel


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
