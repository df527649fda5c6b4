"""X07's report of an X07 program: the compiler's report from the build VM, and the program's frames. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec
from msgspec.structs import replace

from x07_sandbox.host.decoding import known
from x07_sandbox.x07.framed_output import read_protocol
from x07_sandbox.x07.runner_report import FAILED_EXIT, CompileReport, CompileRunReport, runner_report

if TYPE_CHECKING:
    from x07_sandbox.runs.program import Program
    from x07_sandbox.runs.result import Result
    from x07_sandbox.x07.runner_report import Built, CompileMode

UNREADABLE: Final = "the compiler's report cannot be read"


class _CompilerReport(msgspec.Struct, frozen=True):
    """The part of the compiler's report that we use; every field is checked, since it comes from a guest."""

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
        compiled = msgspec.json.decode(output, type=known(_CompilerReport)).compile
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        compiled = replace(report.compile, ok=False, exit_status=report.compile.exit_status or FAILED_EXIT)
        compiled = replace(compiled, compile_error=UNREADABLE, trap=f"{UNREADABLE}: {exc}", compiled_exe=None)
        return replace(report, compile=replace(compiled, compiled_exe_size=None), solve=None, exit_code=FAILED_EXIT)
    if result.outcome == "build-failed" and compiled.ok:  # it reports success without an executable
        compiled = replace(compiled, ok=False, exit_status=FAILED_EXIT, compile_error=result.reason, trap=result.reason)
    return read_protocol(replace(report, compile=compiled))


def report_of(result: Result, built: Built, program: Program) -> CompileRunReport:
    """Return X07's report of a run of any program."""
    return runner_report(result, built) if program.toolchain.protocol is None else x07_report(result, built)


def mode_of(program: Program) -> CompileMode:
    """Return X07's name for the way a program is built and run."""
    return "project-compile-run" if program.project else "compile-run"


def describe_ending(result: Result, report: CompileRunReport) -> list[str]:
    """Return a message about what failed, if anything; changes that were not applied are reported elsewhere."""
    if not report.exit_code or (result.ok and result.x07_exit_code):
        return []
    if not result.ok:
        return [f"{result.outcome}: {result.reason}"]
    # The program exited with 0, but it or its compiler broke X07's protocol.
    trap = report.compile.trap if report.solve is None else report.solve.trap
    return [f"failed: {result.reason}, but {trap}"]
