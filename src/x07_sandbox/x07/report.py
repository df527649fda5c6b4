"""The report of an X07 program: what its compiler said in the build VM, and how it spoke in the run VM. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec
from msgspec.structs import replace

from x07_sandbox.host.decoding import prepared
from x07_sandbox.x07.framed_output import read_protocol
from x07_sandbox.x07.runner_report import FAILED_EXIT, CompileReport, CompileRunReport, runner_report

if TYPE_CHECKING:
    from x07_sandbox.runs.program import Program
    from x07_sandbox.runs.result import Result
    from x07_sandbox.x07.runner_report import Built, CompileMode

UNREADABLE: Final = "the compiler's report cannot be read"


class _Said(msgspec.Struct, frozen=True):
    """The compiler's report, as far as it goes into ours; it comes from a guest, so its every field is checked."""

    compile: CompileReport


def x07_report(result: Result, built: Built) -> CompileRunReport:
    """The report of a run of an X07 program that ended as *result* says."""
    report = runner_report(result, built)
    if result.outcome != "build-failed" and result.digests.artifact is None:
        return report  # nothing was compiled
    if result.artifact_from == "caller":
        return read_protocol(report)  # it was compiled before, and who did that has the compiler's word
    said = result.build.stdout.data if result.build is not None else b""
    try:
        compiled = msgspec.json.decode(said, type=prepared(_Said)).compile
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        compiled = replace(report.compile, ok=False, exit_status=report.compile.exit_status or FAILED_EXIT)
        compiled = replace(compiled, compile_error=UNREADABLE, trap=f"{UNREADABLE}: {exc}", compiled_exe=None)
        return replace(report, compile=replace(compiled, compiled_exe_size=None), solve=None, exit_code=FAILED_EXIT)
    if result.outcome == "build-failed" and compiled.ok:  # it says so, and yet there is no executable
        compiled = replace(compiled, ok=False, exit_status=FAILED_EXIT, compile_error=result.reason, trap=result.reason)
    return read_protocol(replace(report, compile=compiled))


def report_of(result: Result, built: Built, program: Program) -> CompileRunReport:
    """X07's report of a run of any program."""
    return runner_report(result, built) if program.toolchain.protocol is None else x07_report(result, built)


def mode_of(program: Program) -> CompileMode:
    """What X07 calls the way in which it is built and run."""
    return "project-compile-run" if program.project else "compile-run"


def describe_ending(result: Result, report: CompileRunReport) -> list[str]:
    """What did not end well, as a line, if anything; of changes that were kept back others tell."""
    if not report.exit_code or (result.ok and result.x07_exit_code):
        return []
    if not result.ok:
        return [f"{result.outcome}: {result.reason}"]
    # The program's own word is that it ended well; it is X07's protocol that it or its compiler did not keep to.
    trap = report.compile.trap if report.solve is None else report.solve.trap
    return [f"failed: {result.reason}, but {trap}"]
