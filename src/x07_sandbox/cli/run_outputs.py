"""Files that `x07 run` writes of a run because its flags name them: executable, patch, result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from x07_sandbox.cli.atomic_output import (
    collect_error,
    with_write_errors,
    write_all,
    write_atomically,
    write_bytes,
    write_executable,
)
from x07_sandbox.cli.changes_text import changes_json, patch_chunks
from x07_sandbox.files.changes import ChangeSet
from x07_sandbox.reports.result import render_result
from x07_sandbox.runs.folder import NET_LOG, all_runs
from x07_sandbox.runs.saved_changes import KeptChanges, find

if TYPE_CHECKING:
    import argparse

    from x07_sandbox.runs.result import Result
    from x07_sandbox.runs.streams import OutFile


def write_files(options: argparse.Namespace, result: Result, artifact: OutFile | None) -> tuple[Result, list[str]]:
    """Write what the flags ask for, the result last. Returns the result, and a line for each file that failed.

    Each such line is a warning of the result, whose exit code is then 125.
    """
    write_errors: list[str] = []
    if artifact is not None and artifact.complete:
        with collect_error(write_errors):
            write_executable(options.compiled_out, artifact)
    write_records(options, result, write_errors)
    told = with_write_errors(result, write_errors)
    if options.report_out is not None:
        with collect_error(write_errors):
            write_bytes(options.report_out, render_result(told, full=options.json == "full"))
    return with_write_errors(result, write_errors), write_errors


def write_net_log(path: Path, result: Result) -> None:
    """Write a run's log of connections, which is empty where it could have none. Raises OSError, SandboxError."""
    log = all_runs() / result.run / NET_LOG
    write_bytes(path, log.read_bytes() if log.is_file() else b"")


def write_records(options: argparse.Namespace, result: Result, write_errors: list[str]) -> None:
    """Write changes and log of connections where flags ask for them. write_errors: gets a line for each failure."""
    for path, write in ((options.diff, write_diff), (options.net_log, write_net_log)):
        if path is not None:
            with collect_error(write_errors):
                write(path, result)


def write_diff(path: Path, result: Result) -> None:
    """Write a run's changes as a patch, which may be empty, and beside it, as FILE.json, all of it with digests.

    Raises OSError, SandboxError.
    """
    kept = KeptChanges(run=result.run, folder=path.parent, changes=ChangeSet(run=result.run, roots=()))
    if result.changes.state not in {"none", "discarded"}:
        kept = find(result.run)

    def put(fd: int) -> None:
        for piece in patch_chunks(kept):
            write_all(fd, piece)

    write_atomically(path, put)
    write_bytes(path.with_name(f"{path.name}.json"), changes_json(kept.changes))
