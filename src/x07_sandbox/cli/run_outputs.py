"""Writing of the files that flags of `x07 run` name: executable, patch, log of connections, result."""

import argparse
from pathlib import Path

from x07_sandbox.cli.atomic_output import (
    collect_error,
    with_write_errors,
    write_atomically,
    write_bytes,
    write_executable,
)
from x07_sandbox.cli.changes_text import changes_json
from x07_sandbox.files.changes import ChangeSet
from x07_sandbox.host.waiting import write_all
from x07_sandbox.records.runs import NET_LOG, all_runs
from x07_sandbox.reports.result import render_result
from x07_sandbox.sessions.patches import patch_chunks
from x07_sandbox.sessions.result import Result
from x07_sandbox.sessions.saved_changes import SavedChanges, find_saved
from x07_sandbox.sessions.transfers import OutFile


def write_files(options: argparse.Namespace, result: Result, artifact: OutFile | None) -> tuple[Result, list[str]]:
    """Write the files that flags name. Return the result, with a warning for each failure, and these warnings."""
    write_errors: list[str] = []
    if artifact is not None and artifact.complete:
        with collect_error(write_errors):
            write_executable(options.compiled_out, artifact)
    write_records(options, result, write_errors)
    if options.report_out is not None:
        with collect_error(write_errors):
            report = render_result(with_write_errors(result, write_errors), full=options.json == "full")
            write_bytes(options.report_out, report)
    return with_write_errors(result, write_errors), write_errors


def write_records(options: argparse.Namespace, result: Result, write_errors: list[str]) -> None:
    """Write the patch and the log of connections if flags name files for them; append failures to *write_errors*."""
    for path, write in ((options.diff, write_diff), (options.net_log, _write_net_log)):
        if path is not None:
            with collect_error(write_errors):
                write(path, result)


def _write_net_log(path: Path, result: Result) -> None:
    log = all_runs() / result.run / NET_LOG
    write_bytes(path, log.read_bytes() if log.is_file() else b"")


def write_diff(path: Path, result: Result) -> None:
    """Write a run's changes as a patch, and as JSON with digests to FILE.json. Raises OSError, SandboxError."""
    kept = SavedChanges(run=result.run, folder=path.parent, changes=ChangeSet(run=result.run, roots=()))
    if result.changes.state not in {"none", "discarded"}:
        kept = find_saved(result.run)

    def fill(fd: int) -> None:
        for chunk in patch_chunks(kept):
            write_all(fd, chunk)

    write_atomically(path, fill)
    write_bytes(path.with_name(f"{path.name}.json"), changes_json(kept.changes))
