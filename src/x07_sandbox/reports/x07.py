"""The report of an X07 program: what its compiler said in the build VM, and how it spoke in the run VM. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec
from msgspec.structs import replace

from x07_sandbox.host.models import known
from x07_sandbox.reports.protocol import read_protocol
from x07_sandbox.reports.runner import FAILED_EXIT, CompileReport, CompileRunReport, runner_report

if TYPE_CHECKING:
    from x07_sandbox.reports.runner import Built
    from x07_sandbox.runs.result import Result

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
        compiled = msgspec.json.decode(said, type=known(_Said)).compile
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        compiled = replace(report.compile, ok=False, exit_status=report.compile.exit_status or FAILED_EXIT)
        compiled = replace(compiled, compile_error=UNREADABLE, trap=f"{UNREADABLE}: {exc}", compiled_exe=None)
        return replace(report, compile=replace(compiled, compiled_exe_size=None), solve=None, exit_code=FAILED_EXIT)
    if result.outcome == "build-failed" and compiled.ok:  # it says so, and yet there is no executable
        compiled = replace(compiled, ok=False, exit_status=FAILED_EXIT, compile_error=result.reason, trap=result.reason)
    return read_protocol(replace(report, compile=compiled))
