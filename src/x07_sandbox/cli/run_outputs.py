"""Files that `x07 run` writes of a run because its flags name them: executable, patch, result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from x07_sandbox.cli.atomic_output import noted, with_unwritten, write_all, write_bytes, write_executable, write_whole
from x07_sandbox.cli.changes_text import machine_form, pieces
from x07_sandbox.files.changes import ChangeSet
from x07_sandbox.reports.result import render_result
from x07_sandbox.runs.folder import NET_LOG, all_runs
from x07_sandbox.runs.saved_changes import SavedChanges, find_saved

if TYPE_CHECKING:
    import argparse

    from x07_sandbox.runs.result import Result
    from x07_sandbox.runs.streams import OutFile


def write_files(options: argparse.Namespace, result: Result, artifact: OutFile | None) -> tuple[Result, list[str]]:
    """Write what the flags ask for, the result last. Returns the result, and a line for each file that failed.

    Each such line is a warning of the result, whose exit code is then 125.
    """
    unwritten: list[str] = []
    if artifact is not None and artifact.complete:
        with noted(unwritten):
            write_executable(options.compiled_out, artifact)
    write_records(options, result, unwritten)
    told = with_unwritten(result, unwritten)
    if options.report_out is not None:
        with noted(unwritten):
            write_bytes(options.report_out, render_result(told, full=options.json == "full"))
    return with_unwritten(result, unwritten), unwritten


def write_net_log(path: Path, result: Result) -> None:
    """Write a run's log of connections, which is empty where it could have none. Raises OSError, SandboxError."""
    log = all_runs() / result.run / NET_LOG
    write_bytes(path, log.read_bytes() if log.is_file() else b"")


def write_records(options: argparse.Namespace, result: Result, unwritten: list[str]) -> None:
    """Write changes and log of connections where flags ask for them. unwritten: gets a line for each failure."""
    for path, write in ((options.diff, write_diff), (options.net_log, write_net_log)):
        if path is not None:
            with noted(unwritten):
                write(path, result)


def write_diff(path: Path, result: Result) -> None:
    """Write a run's changes as a patch, which may be empty, and beside it, as FILE.json, all of it with digests.

    Raises OSError, SandboxError.
    """
    kept = SavedChanges(run=result.run, folder=path.parent, changes=ChangeSet(run=result.run, roots=()))
    if result.changes.state not in {"none", "discarded"}:
        kept = find_saved(result.run)

    def put(fd: int) -> None:
        for piece in pieces(kept):
            write_all(fd, piece)

    write_whole(path, put)
    write_bytes(path.with_name(f"{path.name}.json"), machine_form(kept.changes))
