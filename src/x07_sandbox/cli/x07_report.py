"""X07's report of a run, and the files that are asked for with it: for `x07-os-runner` and `x07 run --report`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from x07_sandbox.cli.written import write_all, write_executable, write_whole
from x07_sandbox.policy import Policy
from x07_sandbox.programs.toolchains import ARTIFACT, OUTPUT, PROGRAM_FOLDER, Toolchain
from x07_sandbox.reports.attestation import WRITE_CODE, Attested, attest, reference
from x07_sandbox.reports.runner import Built, CompileMode, CompileRunReport, render_report, runner_report
from x07_sandbox.reports.x07 import x07_report

if TYPE_CHECKING:
    from x07_sandbox.runs.result import Result
    from x07_sandbox.runs.streams import OutFile


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What the report tells besides the result.

    policy_path: as the user named it, None for the built-in one. input_bytes: how long the input is.
    compiled_out, attest_runtime: files to be written, or None. accepted: whether weaker isolation was.
    """

    mode: CompileMode
    toolchain: Toolchain
    policy: Policy
    policy_bytes: bytes
    policy_path: str | None
    input_bytes: int
    compiled_out: Path | None
    attest_runtime: Path | None
    accepted: bool


def make_report(wanted: Wanted, result: Result, artifact: OutFile) -> tuple[CompileRunReport, list[str]]:
    """The report, and lines for the user; the files are written. Raises RefusedError where one cannot be."""
    built = Built(
        mode=wanted.mode,
        world="run-os-sandboxed",
        lang_id=wanted.toolchain.name,
        path=OUTPUT,
        size=artifact.size,
    )
    report = x07_report(result, built) if wanted.toolchain.told else runner_report(result, built)
    if wanted.compiled_out is not None and report.compile.ok:
        write_executable(wanted.compiled_out, artifact)
    ending = [f"{result.outcome}: {result.reason}"] if report.exit_code else []
    if wanted.attest_runtime is None:
        return report, ending
    if report.solve is None or "run" not in result.phases:
        return report, ["nothing was run, so nothing is attested", *ending]
    given = Attested(
        policy=wanted.policy,
        policy_bytes=wanted.policy_bytes,
        policy_path=wanted.policy_path,
        artifact_path=PROGRAM_FOLDER if wanted.toolchain.archive else ARTIFACT,
        input_len_bytes=wanted.input_bytes,
        weaker_isolation=wanted.accepted,
    )
    made = attest(result, report.solve, given)
    write_whole(wanted.attest_runtime, partial(write_all, data=render_report(made)), code=f"{WRITE_CODE}: ")
    return replace(report, runtime_attestation=reference(str(wanted.attest_runtime), made)), ending
