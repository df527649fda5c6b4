"""The JSON document of `x07 run`: the result of a run, or an error that ended the command, in the same form."""

import argparse
import contextlib
import re
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from x07_sandbox.cli.atomic_output import UnwritableError, check_outputs, with_write_errors, write_bytes
from x07_sandbox.cli.console import write_stdout
from x07_sandbox.errors import Cancelled, SandboxError
from x07_sandbox.reports.result import render_result
from x07_sandbox.sessions.result import Result
from x07_sandbox.sessions.run import failure

# The first bytes of an earlier report; projects and policies have other versions.
_REPORT: Final = re.compile(rb'\{\s*"schema_version":\s*"x07(\.sandbox\.|\.run\.report@|-os-runner\.report@)')
_HEAD_BYTES: Final = 100


def print_result(result: Result, *, full: bool = False) -> int:
    """Print a run as one JSON object; return its exit code."""
    write_stdout(render_result(result, full=full))
    return result.x07_exit_code


def print_failure(exc: Exception, code: int | None = None) -> int:
    """Print an error that ended the command as one JSON object. Return the exit code, which is *code* if given."""
    return print_result(_failed(exc, code))


def write_failure(options: argparse.Namespace, exc: Exception, code: int | None = None) -> None:
    """Write an error that ended the command to the file of --report-out, so that no earlier report stays there.

    The program's files may be unknown when the error occurs, and must not be overwritten. So the error is written only
    if the file is new, empty or an earlier report, and no other flag names the file. A failure to write is ignored.
    """
    path: Path | None = options.report_out
    if path is None or options.dry_run or (isinstance(exc, UnwritableError) and exc.path == path):
        return
    others = [value for name, value in vars(options).items() if name != "report_out"]
    others += [name for value in others if isinstance(value, list) for name in value]
    named = [Path(one) for one in (*others, f"{options.diff}.json") if isinstance(one, str | Path)]
    with contextlib.suppress(OSError, SandboxError, ValueError):
        check_outputs({"--report-out": path}, named)
        if not path.exists() or _is_report(path):
            write_bytes(path, render_result(_failed(exc, code), full=options.json == "full"))


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    return not head or _REPORT.match(head) is not None


def _failed(exc: Exception, code: int | None) -> Result:
    """Return the result that the error carries, or a result for a run that never started. code: the new exit code."""
    if isinstance(exc, SandboxError) and exc.result is not None:
        result: Result = with_write_errors(exc.result, [str(exc)])
    else:
        result = failure(exc, exc.signal if isinstance(exc, Cancelled) else None)
    return result if code is None else replace(result, x07_exit_code=code)
