"""X07's report about a run, for `x07-os-runner` and for `x07 run --report`, which prints it instead of the output."""

import argparse
import contextlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from msgspec.structs import replace

from x07_sandbox.cli.console import say, write_stdout
from x07_sandbox.cli.messages import change_lines, denial_lines, for_flags
from x07_sandbox.cli.outputs import (
    artifact_file,
    collect_error,
    print_failure,
    write_bytes,
    write_executable,
    write_failure,
    write_records,
)
from x07_sandbox.errors import RefusedError, SandboxError, UsageError
from x07_sandbox.host.documents import render_json
from x07_sandbox.host.paths import is_file, is_folder
from x07_sandbox.host.variables import flag
from x07_sandbox.policy.model import EffectivePolicy, PolicyError
from x07_sandbox.policy.outcomes import REFUSED_EXIT
from x07_sandbox.programs.project import project_root, write_document
from x07_sandbox.programs.toolchains import ARTIFACT, PROGRAM_FOLDER, Protocol
from x07_sandbox.sessions import request as requests
from x07_sandbox.sessions.request import Program, RunCaller, RunRequest
from x07_sandbox.sessions.result import Result
from x07_sandbox.sessions.run import carry_out
from x07_sandbox.x07 import runner_report
from x07_sandbox.x07.project import INPUT_MAX_BYTES, PROJECT_FILE, USAGE_EXIT, diagnostics_line
from x07_sandbox.x07.runner_report import WRITE_CODE, Attested, CompileRunReport, attest, reference

_SCHEMA_EXIT = 3


def with_x07_exits(options: argparse.Namespace, carry_out: Callable[[], int]) -> int:
    """Call *carry_out* to run an X07 program. A UsageError or RefusedError before the run gets X07's exit code."""
    try:
        return carry_out()
    except (UsageError, RefusedError) as exc:
        code = x07_exit(exc)
        write_failure(options, exc, code)
        if options.json and not (options.quiet_json or options.report or options.attest_runtime):
            return print_failure(exc, code=code)
        if code == USAGE_EXIT:
            say(str(exc))
        return code


def from_project(options: argparse.Namespace, program: Path) -> None:
    """If *program* is an X07 project, make the paths of the policy and of the host lists relative to its folder."""
    if not is_folder(program) and program.name != PROJECT_FILE:
        return
    root = program if is_folder(program) else program.parent
    if options.policy is not None and not options.policy.startswith("built-in:"):
        options.policy = str(root / options.policy)
    for lists in (options.allow_host_file, options.deny_host_file):
        lists[:] = [str(root / name) for name in lists]


def x07_exit(exc: UsageError | RefusedError) -> int:
    """Return X07's exit code for an error before the run. Print errors in the policy as X07's tools do."""
    if not isinstance(exc, PolicyError) or exc.in_schema:
        return USAGE_EXIT
    sys.stderr.write(diagnostics_line([str(problem) for problem in exc.problems]) + "\n")
    return _SCHEMA_EXIT


def run_with_report(
    request: RunRequest, caller: RunCaller, options: argparse.Namespace, stack: contextlib.ExitStack
) -> int:
    """Run the program, print X07's report on the run and return the report's exit code. Raises SandboxError."""
    program = caller.program
    assert program is not None
    caller = replace(caller, policy=caller.policy or requests.effective_policy_of(request))
    path = None if request.policy is None else str(request.policy)
    result, report = run_and_report(request, caller, options, stack, path)
    write_errors: list[str] = []
    write_records(options, result, write_errors)
    printed = report if options.artifact is None else runner_report.flat_report(report)
    if options.report == "wrapped":
        text = render_json(runner_report.wrap(printed, runner_report.target_of(program, request.program, printed)))
    else:
        text = render_json(printed)
    if options.report_out is not None:
        with collect_error(write_errors):
            write_bytes(options.report_out, text)
    for line in write_errors:
        say(line)
    if not options.quiet_json:
        write_stdout(text)
    if write_errors:
        protocol = program.toolchain.protocol
        return REFUSED_EXIT if protocol is None else protocol.usage_exit
    return report.exit_code


def with_derived_file(
    request: RunRequest, program: Program, protocol: Protocol
) -> tuple[RunRequest, EffectivePolicy | None]:
    """Write the policy, with its overrides applied, to the project, as X07's command does.

    Return the changed request and the policy; None if there are no overrides. Raises UsageError, PolicyError.
    """
    requests.need_policy(request, protocol)
    if request.overrides is None:
        return request, None
    root = project_root(request.program if program.project and request.program and is_file(request.program) else None)
    if request.program is not None and is_folder(request.program):
        root = request.program
    granted = requests.derived_policy(request, gate=False)
    parts = (".x07", "policies", "_generated", granted.file_name)
    place = root.joinpath(*parts)
    fix = f"Make {place.parent} writable, or omit the flags that change the policy"
    write_document(root, parts, granted.data, overwrite=True, fix=fix)
    say(f"using derived policy {place}", "x07 run")
    policy = requests.with_limits(granted._replace(base=str(place)), request.limits)
    return replace(request, policy=place, overrides=None), policy


def run_and_report(
    request: RunRequest,
    caller: RunCaller,
    options: argparse.Namespace,
    stack: contextlib.ExitStack,
    policy_path: str | None,
    flags: frozenset[str] | None = None,
) -> tuple[Result, CompileRunReport]:
    """Run the program of *caller*, write the files that *options* name, and return the result and the report.

    policy_path: the path as the user typed it; None for a built-in policy. flags: those of `x07-os-runner`; None for
    `x07 run`. Raises UsageError, or, if a file was not written, RefusedError with the result.
    """
    program, tell = caller.program, say if flags is None else partial(say, command="x07-os-runner")
    assert program is not None
    with caller.cancel.waiting():  # it may be a pipe
        data = requests.read_whole(requests.open_input(request, program.input_fd, stack), INPUT_MAX_BYTES)
    if options.attest_runtime is not None:
        options.attest_runtime.unlink(missing_ok=True)  # it attests an earlier run
    artifact = artifact_file(stack)
    caller = replace(caller, live_stdout=None, live_stderr=2, artifact=artifact)
    result, error = carry_out(replace(request, input=data), caller, tell)
    caller.progress("")
    if isinstance(error, UsageError):
        raise error
    advised, command = (result, "") if flags is None else (for_flags(result, flags), "x07 run ")
    aftermath, ending = [*denial_lines(advised, command), *change_lines(advised)], list[str]()
    try:
        report = runner_report.report_of(result, program, artifact.size)
        if options.compiled_out is not None and report.compile.ok:
            write_executable(options.compiled_out, artifact)
        lines = runner_report.describe_ending(result, report, error)
        if options.attest_runtime is not None and (report.solve is None or "run" not in result.phases):
            lines = ["no attestation: nothing was run", *lines]
        elif options.attest_runtime is not None:
            report = _attested(result, report, caller, options, (policy_path, len(data)))
        ending = lines
    except SandboxError as exc:
        exc.result = result
        raise
    finally:
        for line in (*ending, *aftermath):  # the changes to the user's files are reported in any case
            tell(line)
    return result, report


def _attested(
    result: Result,
    report: CompileRunReport,
    caller: RunCaller,
    options: argparse.Namespace,
    given: tuple[str | None, int],
) -> CompileRunReport:
    """Write the attestation of the run, and return the report that refers to it. Raises RefusedError.

    given: the policy's path as the user typed it, and the size of the input.
    """
    program, policy, (policy_path, input_size) = caller.program, caller.policy, given
    assert program is not None and policy is not None and report.solve is not None  # noqa: PT018 - only for the type checker
    facts = Attested(
        policy=policy.policy,
        policy_bytes=policy.data,
        policy_path=policy_path,
        artifact_path=PROGRAM_FOLDER if program.toolchain.packs else ARTIFACT,
        input_len_bytes=input_size,
        weaker_isolation=options.i_accept_weaker_isolation or flag("X07_I_ACCEPT_WEAKER_ISOLATION"),
        denied=policy.denied,
    )
    made = attest(result, report.solve, facts)
    write_bytes(options.attest_runtime, render_json(made), code=f"{WRITE_CODE}: ")
    return replace(report, runtime_attestation=reference(str(options.attest_runtime), made))
