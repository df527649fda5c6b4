"""X07's report of an X07 program, made from the compiler's report in the build VM and the program's frames. No I/O.

The program's output is a frame: a length of four bytes, little-endian, then the data. The counters of the X07 runtime
are in the last line of standard error that is a JSON object with a counter. All of this is hostile data.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec.structs import replace

from x07_sandbox.errors import with_full_stop
from x07_sandbox.host.decoding import prepared
from x07_sandbox.plan.outcomes import ending_line
from x07_sandbox.x07.protocol import HEAD_BYTES
from x07_sandbox.x07.runner_report import (
    COUNTERS,
    FAILED_EXIT,
    CompileReport,
    CompileRunReport,
    SolveReport,
    runner_report,
)

if TYPE_CHECKING:
    from x07_sandbox.runs.request import Program
    from x07_sandbox.runs.result import Result
    from x07_sandbox.x07.runner_report import Built, CompileMode

UNREADABLE: Final = "the compiler's report cannot be read"
NOT_FRAMED: Final = "stdout is not one complete frame"
NO_METRICS: Final = "stderr has no line of metrics"


# The counters of the X07 runtime; None if missing. Other keys are ignored.
Metrics: Final = msgspec.defstruct(
    "Metrics",
    [(field.name, field.type, None) for field in msgspec.structs.fields(SolveReport) if field.name in COUNTERS],
    frozen=True,
)


def framed_output(stdout: bytes) -> bytes | None:
    """Return the program's output, or None if standard output is not exactly one frame."""
    if len(stdout) < HEAD_BYTES or struct.unpack_from("<I", stdout)[0] != len(stdout) - HEAD_BYTES:
        return None
    return stdout[HEAD_BYTES:]


def find_metrics(stderr: bytes) -> dict[str, Any] | None:
    """Return the counters from the last line of standard error that has counters, or None without such a line."""
    for line in reversed(stderr.splitlines()):
        if not line.lstrip().startswith(b"{"):
            continue
        try:
            found = msgspec.json.decode(line, type=prepared(Metrics))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
        if found != Metrics():
            return msgspec.structs.asdict(found)
    return None


def read_protocol(report: CompileRunReport) -> CompileRunReport:
    """Return the report with the program's output and counters. A program that broke the protocol counts as failed."""
    solve = report.solve
    if solve is None:
        return report
    output, metrics, trap = framed_output(solve.stdout_b64), find_metrics(solve.stderr_b64), solve.trap
    if trap is None and solve.ok:
        trap = NOT_FRAMED if output is None else NO_METRICS if metrics is None else None
    solve = replace(solve, ok=solve.ok and trap is None, solve_output_b64=output or b"", trap=trap, **(metrics or {}))
    good = report.compile.ok and solve.ok and solve.exit_status == 0
    return replace(report, solve=solve, exit_code=0 if good else FAILED_EXIT)


class _CompilerReport(msgspec.Struct, frozen=True):
    """The part of the compiler's report that is used. Every field is checked, because the report comes from a guest."""

    compile: CompileReport


def x07_report(result: Result, built: Built) -> CompileRunReport:
    """Return the report of a run of an X07 program."""
    report = runner_report(result, built)
    if result.outcome != "build-failed" and result.digests.artifact is None:
        return report  # nothing was compiled
    if result.artifact_from == "caller":
        return read_protocol(report)  # compiled earlier, so there is no compiler's report
    output = result.build.stdout.data if result.build is not None else b""
    try:
        compiled = msgspec.json.decode(output, type=prepared(_CompilerReport)).compile
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        compiled = replace(report.compile, ok=False, exit_status=report.compile.exit_status or FAILED_EXIT)
        compiled = replace(compiled, compile_error=UNREADABLE, trap=f"{UNREADABLE}: {exc}", compiled_exe=None)
        return replace(report, compile=replace(compiled, compiled_exe_size=None), solve=None, exit_code=FAILED_EXIT)
    if result.outcome == "build-failed" and compiled.ok:  # the compiler reports success without an executable
        compiled = replace(compiled, ok=False, exit_status=FAILED_EXIT, compile_error=result.reason, trap=result.reason)
    return read_protocol(replace(report, compile=compiled))


def report_of(result: Result, built: Built, program: Program) -> CompileRunReport:
    """Return X07's report of a run of any program."""
    return runner_report(result, built) if program.toolchain.protocol is None else x07_report(result, built)


def mode_of(program: Program) -> CompileMode:
    """Return the mode in X07's report: how a program is built and run."""
    return "project-compile-run" if program.project else "compile-run"


def describe_ending(result: Result, report: CompileRunReport) -> list[str]:
    """Return a message about the failure, if there is one. Changes that were not applied have their own messages."""
    if not report.exit_code or (result.ok and result.x07_exit_code):
        return []
    if not result.ok:
        return [ending_line(result.outcome, result.reason)]
    # The program exited with 0, but it or its compiler broke X07's protocol.
    trap = report.compile.trap if report.solve is None else report.solve.trap
    return [with_full_stop(f"failed: {result.reason}, but {trap}")]
