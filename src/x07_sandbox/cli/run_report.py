"""`x07 run --report`: X07's report in place of the program's output."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from x07_sandbox.cli.console import say
from x07_sandbox.cli.written import check_place, write_all, write_whole
from x07_sandbox.cli.x07_report import Wanted, make_report
from x07_sandbox.errors import UsageError
from x07_sandbox.host import settings
from x07_sandbox.host.paths import private_dir, state_dir
from x07_sandbox.host.variables import flag
from x07_sandbox.programs.toolchains import OUTPUT
from x07_sandbox.reports.runner import CompileRunReport, render_report
from x07_sandbox.reports.wrapped import Target, wrap
from x07_sandbox.runs.folder import unnamed_file
from x07_sandbox.runs.program import load_program
from x07_sandbox.runs.request import open_input, policy_in_force
from x07_sandbox.runs.run import run
from x07_sandbox.runs.streams import memory_file

if TYPE_CHECKING:
    import argparse
    import contextlib

    from x07_sandbox.runs.request import RunRequest

_INPUT_MAX_BYTES = 64 * settings.MIB
_USAGE_EXIT = 2


def run_with_report(request: RunRequest, options: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    """Carry the request out and print X07's report; its exit code. Raises SandboxError before there is a run."""
    for name, place in (("--compiled-out", options.compiled_out), ("--attest-runtime", options.attest_runtime)):
        if place is not None:
            check_place(name, place)
    request, program = load_program(request, stack)
    policy, policy_bytes = policy_in_force(request)
    data = _read_all(open_input(request, stack))
    artifact = unnamed_file(private_dir(state_dir()), OUTPUT, settings.ARTIFACT_MAX_BYTES, stack)
    wanted = Wanted(
        mode="project-compile-run" if program.source.files else "compile-run",
        toolchain=program.toolchain,
        policy=policy,
        policy_bytes=policy_bytes,
        policy_path=None if request.policy is None else str(options.policy or request.policy),
        input_bytes=len(data),
        compiled_out=options.compiled_out,
        attest_runtime=options.attest_runtime,
        accepted=options.i_accept_weaker_isolation or flag("X07_I_ACCEPT_WEAKER_ISOLATION"),
    )
    if wanted.attest_runtime is not None:
        wanted.attest_runtime.unlink(missing_ok=True)  # what lies there attests another run
    request = replace(
        request,
        input=None,
        stdin_fd=memory_file(data, stack),
        stdin_default=False,
        live_stdout=None,
        artifact=artifact,
    )
    result = run(request)
    request.progress("")
    if result.outcome == "usage-error":
        say(result.reason)
        return _USAGE_EXIT
    report, line = make_report(wanted, result, artifact)
    for told in (line, f"{result.outcome}: {result.reason}" if report.exit_code else ""):
        if told:
            say(told)
    text = render_report(report) if options.report != "wrapped" else _wrapped(report, options, program.source.files)
    if options.report_out is not None:
        write_whole(options.report_out, partial(write_all, data=text))
    if not options.quiet_json:
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()
    return report.exit_code


def _wrapped(report: CompileRunReport, options: argparse.Namespace, tree: tuple[str, ...]) -> bytes:
    """In X07's envelope, which says what was run."""
    path = Path(options.project or options.program_flag or options.artifact or options.program or "-")
    root = None
    if tree:
        root = str(path if path.is_dir() else path.parent)
    target = Target(
        kind="artifact" if options.artifact else "project" if tree else "program",
        path=str(path),
        project_root=root,
        lockfile=None,
        resolved_module_roots=[],
    )
    return (json.dumps(msgspec.to_builtins(wrap(report, target)), indent=2) + "\n").encode()


def _read_all(fd: int | None) -> bytes:
    """All of the input, since its length is attested. Raises UsageError."""
    data = bytearray()
    while fd is not None and len(data) <= _INPUT_MAX_BYTES:
        try:
            piece = os.read(fd, 1 << 20)
        except OSError as exc:
            raise UsageError("cannot read the input", exc.strerror or str(exc), "Name a file with --input") from exc
        if not piece:
            break
        data += piece
    if len(data) > _INPUT_MAX_BYTES:
        why = f"it has more than {_INPUT_MAX_BYTES} bytes"
        raise UsageError("cannot read the input", why, "Leave out --report: then it is streamed")
    return bytes(data)
