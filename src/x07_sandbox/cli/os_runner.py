"""The command `x07-os-runner`: X07's runner interface over the same run as `x07 run`.

Standard output is one JSON object, X07's report, or nothing (exit 2); all else goes to standard error.
"""

from __future__ import annotations

import contextlib
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NoReturn

from msgspec.structs import replace

from x07_sandbox.backends.lease import PoolMachines
from x07_sandbox.backends.registry import Platform
from x07_sandbox.backends.selection import ACCEPT_VARIABLE, asked, select, this_platform, working
from x07_sandbox.cli.atomic_output import check_outputs, files_read
from x07_sandbox.cli.cancel import cancelled_by_signals
from x07_sandbox.cli.console import LiveLine, put, say
from x07_sandbox.cli.main import end_with
from x07_sandbox.cli.os_runner_options import COMMAND, OPTIONS, parser, specrows
from x07_sandbox.cli.std_streams import settle_in
from x07_sandbox.cli.x07_report import Wanted, run_and_report
from x07_sandbox.errors import HostError, RefusedError, SandboxError, UsageError
from x07_sandbox.host import settings
from x07_sandbox.host.paths import is_folder
from x07_sandbox.host.variables import check_environment, flag, text
from x07_sandbox.housekeeping.start import sweep_before_start
from x07_sandbox.programs.manifest import FILE
from x07_sandbox.reports.document import render_json
from x07_sandbox.runs.program import load_program
from x07_sandbox.runs.request import RunRequest, effective_policy_of, open_input, read_whole
from x07_sandbox.x07.programs import load_x07
from x07_sandbox.x07.project import PROJECT_FILE, Options
from x07_sandbox.x07.protocol import INPUT_MAX_BYTES
from x07_sandbox.x07.report import mode_of
from x07_sandbox.x07.runner_report import World, failure_report

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from x07_sandbox.backends.selection import Choice
    from x07_sandbox.runs.program import Program

SETUP_EXIT: Final = 2
_WORLDS: Final[dict[str, World]] = {"run-os": "run-os", "run-os-sandboxed": "run-os-sandboxed"}
_MANIFESTS: Final = (PROJECT_FILE, FILE)
_SANDBOXED: Final = "--world run-os-sandboxed --policy FILE"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code: 0 ok, 1 a report of a failure, 2 nothing on standard output."""
    settle_in()
    try:
        for warning in check_environment(os.environ):
            _say(warning)
        options = parser().parse_args(argv)
        if options.cli_specrows:
            return _print(specrows().encode(), 0)
        return _carry_out(options)
    except SandboxError as exc:
        _say(str(exc))
    except KeyboardInterrupt:
        _say("cancelled before there was a run")
    except (OSError, MemoryError) as exc:
        from x07_sandbox.host.os_errors import host_error

        _say(str(host_error(exc) or f"cannot go on: {exc}"))
    except Exception:  # noqa: BLE001 - the last place that can keep the exit code's promise
        import traceback

        traceback.print_exc()
        _say("this is a bug in x07-sandbox; please report it with the lines above")
    return SETUP_EXIT


def _carry_out(options: argparse.Namespace) -> int:
    world = _world(options.world or "run-os")
    if options.compile_only:
        raise UsageError("cannot take --compile-only", "it is for X07's own runner inside a guest", "Leave it away")
    given = [option.flag for option in OPTIONS[:3] if getattr(options, option.key) is not None]
    if len(given) != 1:
        what = "none of them was" if not given else f"{' and '.join(given)} were"
        raise UsageError("wrong usage", f"{what} given", "Give exactly one of --program, --project, --artifact")
    _check_policy_flag(world, options)
    accepted = options.i_accept_weaker_isolation or flag(ACCEPT_VARIABLE)
    choice = _choice(this_platform(), world, options.sandbox_backend, accepted=accepted)
    path = _target(options)
    with contextlib.ExitStack() as stack:
        request, program = load_program(replace(_request(path, options, stack), choice=choice), stack)
        if world == "run-os" and choice.sandbox_backend != "vm":
            raise UsageError(f"cannot run in the world {world}", "it has no policy", f"Use {_SANDBOXED}")
        if world == "run-os":
            # Only with --sandbox-backend vm it comes here; X07's runner has a report for that, not a usage error.
            message = "the sandbox backend vm runs run-os-sandboxed only"
            _say(f"{message}. Use {_SANDBOXED}")
            lang_id = program.toolchain.name
            report = failure_report(message, mode=mode_of(program), world=world, lang_id=lang_id)
        else:
            _note_unused(options, program)
            wanted = _wanted(options, request, program, stack, accepted=accepted)
            sweep_before_start(_say)
            _, report = run_and_report(request, wanted, stack, _say)
    return _print(render_json(report), report.exit_code)


def _world(name: str) -> World:
    if name in _WORLDS:
        return _WORLDS[name]
    why = "X07's deterministic worlds have runners of their own" if name.startswith("solve-") else "no such world"
    raise UsageError(f"cannot run in the world {name!r}", why, f"Use {_SANDBOXED}")


def _check_policy_flag(world: World, options: argparse.Namespace) -> None:
    if world == "run-os":
        for name, value in (("--policy", options.policy), ("--attest-runtime", options.attest_runtime)):
            if value is not None:
                raise UsageError(f"{name} does not go with run-os", "that world has no policy", f"Use {_SANDBOXED}")
    elif options.policy is None:
        raise UsageError("no policy", f"{world} runs nothing without one", "Name it with --policy FILE")


def _choice(platform: Platform, world: World, named: str | None, *, accepted: bool) -> Choice:
    """The backend. Raises UsageError or RefusedError where what was asked for cannot be had, or was not accepted."""
    auto: Literal["vm", "none"] = "vm" if world == "run-os-sandboxed" else "none"
    try:
        return select(platform, asked(sandbox=named, accepted=accepted, auto=auto))
    except RefusedError as exc:
        # This command has no --backend, and in run-os not even a virtual machine would do.
        _, sandbox_class, _, _ = working(platform) or working(Platform(system="linux"))
        fix = f"Use {_SANDBOXED} --sandbox-backend {sandbox_class}"
        if text("X07_VM_BACKEND"):  # no value of it would do beside every X07_SANDBOX_BACKEND, and the flag needs none
            fix += ", with X07_VM_BACKEND unset"
        raise RefusedError(exc.what, exc.why, fix if working(platform) else f"{fix}, on Linux") from exc


def _target(options: argparse.Namespace) -> Path:
    """What the flags name. Raises UsageError for what they cannot name."""
    if options.artifact is not None:
        why = "an artifact of X07 speaks X07's own protocol, and only its runner inside a guest may be given one"
        fix = "Give its source with --program, or x07 run"
        raise UsageError(f"cannot run the artifact {options.artifact}", why, fix)
    path = Path(options.program if options.project is None else options.project)
    if options.project is not None and path.name not in _MANIFESTS:
        why = f"a manifest is called {' or '.join(_MANIFESTS)}"
        raise UsageError(f"cannot run the project {path}", why, "Name one, or give --program")
    if options.program is not None and (path.name in _MANIFESTS or is_folder(path)):
        raise UsageError(f"cannot run {path}", "it is a project, no source file", "Name its manifest with --project")
    return path


def _request(path: Path, options: argparse.Namespace, stack: contextlib.ExitStack) -> RunRequest:
    """The run that is asked for, as far as its program is not needed to know it. Raises UsageError."""
    progress = LiveLine()
    stack.callback(progress, "")
    return RunRequest(
        program=path,
        policy=_path(options.policy),
        input=_path(options.input),
        max_output_bytes=settings.MIB if options.max_output_bytes is None else options.max_output_bytes,
        executable=options.compiled_out is not None,
        # Of profiles only `x07 run` knows.
        loaders=(partial(load_x07, options=_x07_options(options), profiles=False),),
        machines=PoolMachines(),
        scale_limits=False,  # X07's report has no place for it
        progress=progress,
        cancel=stack.enter_context(cancelled_by_signals()),
    )


def _wanted(
    options: argparse.Namespace, request: RunRequest, program: Program, stack: contextlib.ExitStack, *, accepted: bool
) -> Wanted:
    """Read and check what the flags name besides the program, before anything starts. Raises UsageError."""
    policy = effective_policy_of(request)
    compiled_out, attest_runtime = _path(options.compiled_out), _path(options.attest_runtime)
    read = [request.program, Path(options.policy), request.input, *files_read(request, program)]
    check_outputs({"--compiled-out": compiled_out, "--attest-runtime": attest_runtime}, read)
    with request.cancel.waiting():  # for whoever opens the other end of a pipe
        data = read_whole(open_input(request, stack), INPUT_MAX_BYTES)
    return Wanted(
        program=program,
        policy=policy,
        policy_path=options.policy,
        data=data,
        compiled_out=compiled_out,
        attest_runtime=attest_runtime,
        accepted=accepted,
        flags=frozenset(option.flag for option in OPTIONS),
    )


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def _x07_options(options: argparse.Namespace) -> Options:
    """What the flags tell X07's compiler. Raises UsageError."""
    names = set(Options.__struct_fields__) - {"max_output_bytes"}  # of every program, and so the request's
    given = {name: getattr(options, name) for name in names if hasattr(options, name)}
    roots = tuple(options.module_root or ())
    return Options(**{name: value for name, value in given.items() if value is not None}, module_roots=roots)


def _note_unused(options: argparse.Namespace, program: Program) -> None:
    """Nothing that was asked for is passed over in silence."""
    if program.toolchain.protocol is not None:
        if program.project and options.module_root:
            _say("--module-root: for single programs only; a project brings its own modules")
        return
    values = {option.flag: getattr(options, option.key) for option in OPTIONS if option.x07_only}
    unused = [name for name, value in values.items() if value is not None and value is not False]
    if unused:
        _say(f"{', '.join(unused)}: for X07 programs only; {program.toolchain.name} programs have the policy's limits")


def _print(data: bytes, code: int) -> int:
    """Write to standard output. Raises HostError."""
    try:
        put(data)  # whole, here, where a full disk behind it is told
    except OSError as exc:
        why, fix = exc.strerror or str(exc), "Send it where there is room for it"
        raise HostError("cannot write to standard output", why, fix) from exc
    return code


def _say(line: str) -> None:
    say(line, COMMAND)


def entry() -> NoReturn:
    """The command itself: run and end with exactly that code."""
    end_with(main)


if __name__ == "__main__":
    sys.exit(entry())
