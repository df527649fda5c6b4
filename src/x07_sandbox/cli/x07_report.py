"""Run a program and make X07's report about the run, for `x07-os-runner` and `x07 run --report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from x07_sandbox.cli import changes_text, denials_text
from x07_sandbox.cli.atomic_output import artifact_file, write_bytes, write_executable
from x07_sandbox.errors import SandboxError, UsageError
from x07_sandbox.library.requests import carry_out
from x07_sandbox.programs.toolchains import ARTIFACT, OUTPUT, PROGRAM_FOLDER
from x07_sandbox.reports.document import render_json
from x07_sandbox.runs.request import EffectivePolicy, Program, open_input, read_whole
from x07_sandbox.x07.attestation import WRITE_CODE, Attested, attest, reference
from x07_sandbox.x07.protocol import INPUT_MAX_BYTES
from x07_sandbox.x07.report import describe_ending, mode_of, report_of
from x07_sandbox.x07.runner_report import Built, CompileRunReport

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable

    from x07_sandbox.runs.request import RunCaller, RunRequest
    from x07_sandbox.runs.result import Result
    from x07_sandbox.sandboxes.transfers import OutFile


class ReportRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Facts that X07's report needs and the run's result lacks, and the paths of the files to write.

    policy_path: the path as the user typed it; None for a built-in policy.
    accepted: whether the user accepted weaker isolation. flags: the flags of the calling command; None for `x07 run`.
    """

    program: Program
    policy: EffectivePolicy
    policy_path: str | None
    compiled_out: Path | None
    attest_runtime: Path | None
    accepted: bool
    flags: frozenset[str] | None = None


def run_and_report(
    request: RunRequest,
    caller: RunCaller,
    wanted: ReportRequest,
    stack: contextlib.ExitStack,
    say: Callable[[str], None],
) -> tuple[Result, CompileRunReport]:
    """Run the request, write the files that *wanted* names, and return the result and the report.

    *say* is called with each message. Raises UsageError, or, if a file was not written, RefusedError with the result.
    """
    with caller.cancel.waiting():  # it may be a pipe
        data = read_whole(open_input(request, wanted.program.input_fd, stack), INPUT_MAX_BYTES)
    artifact = artifact_file(stack)
    if wanted.attest_runtime is not None:
        wanted.attest_runtime.unlink(missing_ok=True)  # it attests an earlier run
    caller = replace(caller, live_stdout=None, live_stderr=2, artifact=artifact)
    caller = replace(caller, program=wanted.program, policy=wanted.policy)
    result, error = carry_out(replace(request, input=data), caller, say)
    caller.progress("")
    if isinstance(error, UsageError):
        raise error
    advised, command = result, ""
    if wanted.flags is not None:
        advised, command = denials_text.for_flags(result, wanted.flags), "x07 run "
    aftermath = [*denials_text.denial_lines(advised, command), *changes_text.change_lines(advised)]
    try:
        report, lines = _make_report(wanted, len(data), result, artifact)
    except SandboxError as exc:
        exc.result = result
        for line in aftermath:  # the changes to the user's files are reported in any case
            say(line)
        raise
    for line in (*lines, *aftermath):
        say(line)
    return result, report


def _make_report(
    wanted: ReportRequest, input_size: int, result: Result, artifact: OutFile
) -> tuple[CompileRunReport, list[str]]:
    """Write the files that *wanted* names; return the report and messages about the run's end. Raises RefusedError."""
    toolchain = wanted.program.toolchain
    built = Built(
        mode=mode_of(wanted.program), world="run-os-sandboxed", lang_id=toolchain.name, path=OUTPUT, size=artifact.size
    )
    report = report_of(result, built, wanted.program)
    if wanted.compiled_out is not None and report.compile.ok:
        write_executable(wanted.compiled_out, artifact)
    ending = describe_ending(result, report)
    if wanted.attest_runtime is None:
        return report, ending
    if report.solve is None or "run" not in result.phases:
        return report, ["no attestation: nothing was run", *ending]
    given = Attested(
        policy=wanted.policy.policy,
        policy_bytes=wanted.policy.data,
        policy_path=wanted.policy_path,
        artifact_path=PROGRAM_FOLDER if toolchain.archive else ARTIFACT,
        input_len_bytes=input_size,
        weaker_isolation=wanted.accepted,
        denied=wanted.policy.denied,
    )
    made = attest(result, report.solve, given)
    write_bytes(wanted.attest_runtime, render_json(made), code=f"{WRITE_CODE}: ")
    return replace(report, runtime_attestation=reference(str(wanted.attest_runtime), made)), ending
