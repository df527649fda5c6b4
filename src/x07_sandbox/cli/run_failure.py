"""The JSON document of `x07 run`: a run's result, or an error that ended the command, as one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from x07_sandbox.cli.atomic_output import is_refused, with_write_errors
from x07_sandbox.cli.console import write_stdout
from x07_sandbox.cli.json_output import write_early_failure
from x07_sandbox.errors import Cancelled, SandboxError
from x07_sandbox.reports.result import render_result
from x07_sandbox.runs.run import failure

if TYPE_CHECKING:
    import argparse

    from x07_sandbox.runs.result import Result


def print_result(result: Result, *, full: bool = False) -> int:
    """A run as one JSON object; its exit code."""
    write_stdout(render_result(result, full=full))
    return result.x07_exit_code


def print_failure(exc: Exception, signalled: int | None = None, code: int | None = None) -> int:
    """Print an error that ended the command as one JSON object; the exit code, *code* if that is given."""
    return print_result(_failed(exc, signalled, code))


def failure_document(exc: Exception, code: int | None = None, *, full: bool = False) -> bytes:
    """The same, as it is written to a file."""
    return render_result(_failed(exc, exc.signal if isinstance(exc, Cancelled) else None, code), full=full)


def write_failure(options: argparse.Namespace, exc: Exception, code: int | None = None) -> None:
    """The same, in the file of --report-out, if there is one that may be written; --dry-run writes nothing."""
    if options.report_out is not None and not options.dry_run:
        if is_refused(exc, options.report_out):
            return
        others = [value for name, value in vars(options).items() if name != "report_out"]
        others += [name for value in others if isinstance(value, list) for name in value]
        others.append(f"{options.diff}.json")
        write_early_failure(failure_document(exc, code, full=options.json == "full"), options.report_out, others)


def _failed(exc: Exception, signalled: int | None, code: int | None) -> Result:
    """The error's own result, if a run led to it; else that of a run that never began."""
    if isinstance(exc, SandboxError) and exc.result is not None:
        result: Result = with_write_errors(exc.result, [str(exc)])
    else:
        result = failure(exc, signalled)
    return result if code is None else replace(result, x07_exit_code=code)
