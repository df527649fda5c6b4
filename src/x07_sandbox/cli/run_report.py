"""`x07 run --report`: print X07's report instead of the program's output."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from msgspec.structs import replace

from x07_sandbox.cli.atomic_output import collect_error, write_bytes
from x07_sandbox.cli.console import say, write_stdout
from x07_sandbox.cli.run_failure import print_failure, write_failure
from x07_sandbox.cli.run_outputs import write_records
from x07_sandbox.cli.x07_report import ReportRequest, run_and_report
from x07_sandbox.errors import RefusedError, UsageError
from x07_sandbox.host.documents import project_root, write_document
from x07_sandbox.host.paths import is_file, is_folder
from x07_sandbox.host.variables import flag
from x07_sandbox.plan.outcomes import REFUSED_EXIT
from x07_sandbox.policy.overrides import check_grants, derive_policy
from x07_sandbox.policy.problems import PolicyError
from x07_sandbox.reports.document import render_json
from x07_sandbox.runs.request import (
    effective_policy_of,
    is_built_in,
    name_of_policy,
    need_policy,
    read_policy,
    read_spec_file,
)
from x07_sandbox.x07.project import PROJECT_FILE, diagnostics_line
from x07_sandbox.x07.protocol import USAGE_EXIT
from x07_sandbox.x07.runner_report import flat_report, target_of, wrap

if TYPE_CHECKING:
    import argparse
    import contextlib
    from collections.abc import Callable
    from pathlib import Path

    from x07_sandbox.programs.protocol import Protocol
    from x07_sandbox.runs.request import EffectivePolicy, Program, RunCaller, RunRequest

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
    assert program is not None  # noqa: S101 - for the type checker
    wanted = ReportRequest(
        program=program,
        policy=caller.policy or effective_policy_of(request),
        policy_path=None if request.policy is None else str(request.policy),
        compiled_out=options.compiled_out,
        attest_runtime=options.attest_runtime,
        accepted=options.i_accept_weaker_isolation or flag("X07_I_ACCEPT_WEAKER_ISOLATION"),
    )
    result, report = run_and_report(request, caller, wanted, stack, say)
    write_errors: list[str] = []
    write_records(options, result, write_errors)
    printed = report if options.artifact is None else flat_report(report)
    if options.report == "wrapped":
        text = render_json(wrap(printed, target_of(program, request.program, printed)))
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
    need_policy(request, protocol)
    if request.overrides is None:
        return request, None
    root = project_root(request.program if program.project and request.program and is_file(request.program) else None)
    if request.program is not None and is_folder(request.program):
        root = request.program
    base, data = read_policy(request.policy)
    name = name_of_policy(request.policy)
    check_grants(base, request.overrides, built_in=is_built_in(request.policy))
    derived = derive_policy(base, data, name, request.overrides, read_spec_file=read_spec_file)
    parts = (".x07", "policies", "_generated", derived.file_name)
    place = root.joinpath(*parts)
    fix = f"Make {place.parent} writable, or omit the flags that change the policy"
    write_document(root, parts, derived.data, overwrite=True, fix=fix)
    say(f"using derived policy {place}", "x07 run")
    limits = request.limits
    if limits is not None:  # the derived file has the same author
        limits = replace(limits, may_raise=is_built_in(request.policy))
    request = replace(request, policy=place, overrides=None, limits=limits)
    return request, effective_policy_of(request)._replace(denied=derived.denied)
