"""The command `x07-os-runner`: X07's runner interface. It runs programs with the same code as `x07 run`.

Standard output is one JSON object, X07's report, or nothing (exit 2). Messages go to standard error. The flags are one
table, the source of parser, JSON description and documentation.
"""

import argparse
import contextlib
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

from msgspec.structs import replace

from x07_sandbox import __version__
from x07_sandbox.backends.registry import (
    ACCEPT_VARIABLE,
    Choice,
    Platform,
    backend_request,
    select,
    this_platform,
    usable_flags,
)
from x07_sandbox.cli.console import LiveLine, OutputError, prepare_streams, say, write_stdout
from x07_sandbox.cli.main import collect_rarely, end_with
from x07_sandbox.cli.outputs import check_outputs, files_read
from x07_sandbox.cli.parser import Parser, add_row
from x07_sandbox.cli.run_report import run_and_report
from x07_sandbox.errors import Command, RefusedError, SandboxError, UsageError
from x07_sandbox.host import settings
from x07_sandbox.host.documents import render_json
from x07_sandbox.host.paths import is_folder
from x07_sandbox.host.settings import MIB
from x07_sandbox.host.variables import SANDBOX_BACKENDS, check_environment, flag, text
from x07_sandbox.host.waiting import cancelled_by_signals
from x07_sandbox.options import Option
from x07_sandbox.programs.project import FILE
from x07_sandbox.sessions.request import Program, RunCaller, RunRequest, effective_policy_of, load_program
from x07_sandbox.sessions.run import pool_machines
from x07_sandbox.x07.programs import load_x07
from x07_sandbox.x07.project import PROJECT_FILE, Options
from x07_sandbox.x07.runner_report import World, failure_report, mode_of

COMMAND: Final = "x07-os-runner"
_SPECROWS: Final = "x07cli.specrows@0.1.0"
_MOST: Final = 1 << 48


class Flag(Option, frozen=True):
    """One flag of this command.

    usual: the default, for texts; the parser stores None for a flag that was not given.
    x07_only: whether the flag affects only X07 programs. hidden: whether help and documentation omit the flag.
    """

    usual: str | int | None = None
    x07_only: bool = False
    hidden: bool = False


_BACKEND: Final = (
    "kind of isolation; auto means vm in run-os-sandboxed and none in run-os (default: X07_SANDBOX_BACKEND, else auto)"
)
_WEAKER: Final = "allow a backend that is not a virtual machine; same as X07_I_ACCEPT_WEAKER_ISOLATION=1"
_ATTEST: Final = "write the attestation of the run to this file; only in run-os-sandboxed"
_MEMORY: Final = "memory limit of an X07 program in bytes; for other programs, the policy's limits.mem_bytes applies"
_CPU: Final = "CPU time limit of an X07 program; for other programs, the policy's limits.cpu_ms applies"
_C_BYTES: Final = "size limit of the C code that the X07 compiler generates, in bytes"
_COMPAT: Final = "the X07 version that the X07 compiler is to be compatible with"
_CC: Final = "how to compile the C code that the X07 compiler generates"
_INNER: Final = "for X07's own runner inside a guest"
_FUEL: Final = "execution budget (fuel) of an X07 program"
_OUTPUT: Final = "limit of each output stream in bytes"
_OURS: Final = (
    Flag("--program", "F", "a source file that x07 run accepts, or *.x07.json", "name"),
    Flag("--project", "F", "the project file: x07.json or x07-sandbox.toml", "name"),
    Flag("--artifact", "F", "an executable that X07 compiled before", "name"),
    Flag("--world", "W", "the X07 world; only run-os-sandboxed is supported", usual="run-os"),
    Flag("--policy", "F", "the policy: required in run-os-sandboxed, rejected in run-os", "name"),
    Flag("--input", "F", "the program's input (default: empty)", "file"),
    Flag("--sandbox-backend", "B", _BACKEND, "choice", choices=tuple(SANDBOX_BACKENDS)),
    Flag("--i-accept-weaker-isolation", "", _WEAKER, "switch"),
    Flag("--max-output-bytes", "N", _OUTPUT, "number", most=_MOST, unit="bytes", usual=MIB),
    Flag("--compiled-out", "F", "write a copy of the built Linux executable to this file", "file"),
    Flag("--attest-runtime", "F", _ATTEST, "file"),
)
_X07S: Final = (
    Flag("--solve-fuel", "N", _FUEL, "number", most=_MOST, unit="units", usual=50_000_000),
    Flag("--max-memory-bytes", "N", _MEMORY, "number", most=_MOST, unit="bytes", usual=64 * MIB),
    Flag("--cpu-time-limit-seconds", "N", _CPU, "number", most=_MOST, unit="seconds", usual=30),
    Flag("--cc-profile", "P", _CC, "choice", choices=("default", "size"), usual="default"),
    Flag("--max-c-bytes", "N", _C_BYTES, "number", most=_MOST, unit="bytes"),
    Flag("--compat", "S", _COMPAT),
    Flag("--debug-borrow-checks", "", "count violations of X07's borrow rules at run time", "switch"),
    Flag("--auto-ffi", "", "compile the native code of packages", "switch"),
    Flag("--module-root", "D", "a folder of X07 modules, for --program (repeatable)", "names"),
)
OPTIONS: Final = (
    *_OURS,
    *(replace(row, x07_only=True) for row in _X07S),
    Flag("--cli-specrows", "", "print a description of all options as JSON and exit", "switch"),
    Flag("--compile-only", "", _INNER, "switch", hidden=True),
    Flag("--i-accept-precompiled-artifact", "", _INNER, "switch", hidden=True),
)

_FLAGS: Final = frozenset(row.flag for row in OPTIONS)

_EPILOG: Final = """standard output: one JSON object, X07's report x07-os-runner.report@0.5.0
exit code: 0 the run succeeded; 1 the report says what failed; 2 wrong usage, policy or setup, and no report

examples:
  x07-os-runner --world run-os-sandboxed --policy policy.json --program prog.c --input data.txt
  x07-os-runner --world run-os-sandboxed --policy policy.json --program prog.py --attest-runtime attest.json
"""


def parser() -> argparse.ArgumentParser:
    """Return the command's parser. It stores None for a value that was not given, not the default named in the help."""
    made = Parser(
        prog=COMMAND,
        description="Build a program in one throw-away VM, run it in another, and print X07's report.",
        epilog=_EPILOG,
    )
    made.add_argument("--version", action="version", version=f"x07-sandbox {__version__}")
    for row in OPTIONS:
        default = "" if row.usual is None else f" (default: {row.usual})"
        text = argparse.SUPPRESS if row.hidden else row.help + default
        add_row(made, replace(row, help=text, metavar="" if row.choices else row.metavar))
    return made


def specrows() -> str:
    """Describe the command line in the format of X07's tools: one line of JSON with a row for each option."""
    rows: list[list[Any]] = [
        ["root", "help", "-h", "--help", "show this help message and exit"],
        ["root", "version", "", "--version", "show the version and exit"],
    ]
    for row in OPTIONS:
        if row.hidden:
            continue
        if row.kind == "switch":
            rows.append(["root", "flag", "", row.flag, row.name, row.help])
            continue
        meta = [] if row.usual is None else [{"default": str(row.usual)}]
        rows.append(["root", "opt", "", row.flag, row.name, row.metavar, row.help, *meta])
    document = {"schema_version": _SPECROWS, "app": {"name": COMMAND, "version": __version__}, "rows": rows}
    return json.dumps(document, separators=(",", ":")) + "\n"


SETUP_EXIT: Final = 2
_WORLDS: Final[dict[str, World]] = {"run-os": "run-os", "run-os-sandboxed": "run-os-sandboxed"}
_MANIFESTS: Final = (PROJECT_FILE, FILE)
_SANDBOXED: Final = "--world run-os-sandboxed --policy FILE"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 for success, 1 for a report of a failure, 2 for an error without a report."""
    collect_rarely()
    prepare_streams()
    try:
        for warning in check_environment(os.environ):
            _say(warning)
        options = parser().parse_args(argv)
        if options.cli_specrows:
            write_stdout(specrows().encode())
            return 0
        return _carry_out(options)
    except SandboxError as exc:
        _say(str(exc))
    except KeyboardInterrupt:
        _say("cancelled before the run started")
    except OutputError as exc:
        _say(f"cannot write to standard output: {exc.strerror}")
    except (OSError, MemoryError) as exc:
        from x07_sandbox.host.paths import host_error

        _say(str(host_error(exc) or f"internal error: {exc}"))
    except Exception:  # noqa: BLE001 - every error must end in a documented exit code
        import traceback

        traceback.print_exc()
        _say("internal error: please report the lines above as a bug in x07-sandbox")
    return SETUP_EXIT


def _carry_out(options: argparse.Namespace) -> int:
    world = _world(options.world or "run-os")
    if options.compile_only:
        raise UsageError("cannot use --compile-only", "it is for X07's own runner inside a guest", "Omit it")
    given = [option.flag for option in OPTIONS[:3] if getattr(options, option.name) is not None]
    if len(given) != 1:
        why = f"{' and '.join(given)} cannot be combined" if given else "no program given"
        raise UsageError("wrong usage", why, "Use exactly one of --program, --project, --artifact")
    _check_policy_flag(world, options)
    accepted = options.i_accept_weaker_isolation or flag(ACCEPT_VARIABLE)
    choice = _choice(this_platform(), world, options.sandbox_backend, accepted=accepted)
    path = _target(options)
    with contextlib.ExitStack() as stack:
        caller = _caller(options, stack, choice)
        request = _request(path, options)
        request, program = load_program(request, caller, stack)
        if world == "run-os" and choice.sandbox_backend != "vm":
            raise UsageError(f"cannot run in the world {world}", "it has no policy", f"Use {_SANDBOXED}")
        if world == "run-os":
            # With --sandbox-backend vm, X07's runner prints a report, not a usage error.
            message = "the sandbox backend vm runs run-os-sandboxed only"
            _say(f"{message}. Use {_SANDBOXED}")
            lang_id = program.toolchain.name
            report = failure_report(message, mode=mode_of(program), world=world, lang_id=lang_id)
        else:
            _note_unused(options, program)
            caller = replace(caller, program=program, policy=effective_policy_of(request))
            read = [request.program, Path(options.policy), options.input, *files_read(request, program)]
            check_outputs({"--compiled-out": options.compiled_out, "--attest-runtime": options.attest_runtime}, read)
            _, report = run_and_report(request, caller, options, stack, options.policy, _FLAGS)
    write_stdout(render_json(report))
    return report.exit_code


def _world(name: str) -> World:
    if name in _WORLDS:
        return _WORLDS[name]
    why = "it has a runner of its own" if name.startswith("solve-") else "there is no such world"
    raise UsageError(f"cannot run in the world {name!r}", why, f"Use {_SANDBOXED}")


def _check_policy_flag(world: World, options: argparse.Namespace) -> None:
    if world == "run-os":
        for name, value in (("--policy", options.policy), ("--attest-runtime", options.attest_runtime)):
            if value is not None:
                raise UsageError(f"cannot use {name} in run-os", "that world has no policy", f"Use {_SANDBOXED}")
    elif options.policy is None:
        raise UsageError("no policy given", f"{world} requires one", "Add --policy FILE")


def _choice(platform: Platform, world: World, named: str | None, *, accepted: bool) -> Choice:
    """Return the selected backend. Raises UsageError or RefusedError if it is not available or not accepted."""
    auto: Literal["vm", "none"] = "vm" if world == "run-os-sandboxed" else "none"
    try:
        return select(platform, backend_request(sandbox=named, accepted=accepted, auto=auto))
    except RefusedError as exc:
        # This command has no --backend, and in run-os even a VM is rejected.
        _, sandbox_class, _, _ = usable_flags(platform) or usable_flags(Platform(system="linux"))
        fix = f"Use {_SANDBOXED} --sandbox-backend {sandbox_class}"
        if text("X07_VM_BACKEND"):  # it may contradict the flag
            fix += ", with X07_VM_BACKEND unset"
        fix = fix if usable_flags(platform) else f"{fix}, on Linux"
        raise RefusedError(exc.what, exc.why, fix, code=exc.code) from exc


def _target(options: argparse.Namespace) -> Path:
    """Return the path of the program or manifest. Raises UsageError."""
    if options.artifact is not None:
        why = "only X07's own runner inside a guest may run an artifact"
        command = Command(f"x07 run --artifact {options.artifact}")
        fix = ("Use --program with its source, or run it: ", command)
        raise UsageError(f"cannot run the artifact {options.artifact}", why, fix)
    path = Path(options.program if options.project is None else options.project)
    if options.project is not None and path.name not in _MANIFESTS:
        why = f"it is not named {' or '.join(_MANIFESTS)}"
        raise UsageError(f"cannot run the project {path}", why, "Give the path of the manifest, or use --program")
    if options.program is not None and (path.name in _MANIFESTS or is_folder(path)):
        raise UsageError(f"cannot run {path}", "it is a project, not a source file", "Use --project with its manifest")
    return path


def _caller(options: argparse.Namespace, stack: contextlib.ExitStack, choice: Choice) -> RunCaller:
    progress = LiveLine()
    stack.callback(progress, "")
    return RunCaller(
        cancel=stack.enter_context(cancelled_by_signals()),
        progress=progress,
        choice=choice,
        # Only `x07 run` uses profiles.
        loaders=(partial(load_x07, options=_x07_options(options), profiles=False),),
        machines=pool_machines(),
    )


def _request(path: Path, options: argparse.Namespace) -> RunRequest:
    return RunRequest(
        program=path,
        policy=None if options.policy is None else Path(options.policy),
        input=options.input,
        stdin=True,  # the input of a project does not apply; without --input there is none
        max_output_bytes=settings.MIB if options.max_output_bytes is None else options.max_output_bytes,
        executable=options.compiled_out is not None,
        scale_limits=False,  # X07's report has no field for it
    )


def _x07_options(options: argparse.Namespace) -> Options:
    """Return the options for X07's compiler. Raises UsageError."""
    names = set(Options.__struct_fields__) - {"max_output_bytes"}  # the request has it
    given = {name: getattr(options, name) for name in names if hasattr(options, name)}
    roots = tuple(options.module_root or ())
    return Options(**{name: value for name, value in given.items() if value is not None}, module_roots=roots)


def _note_unused(options: argparse.Namespace, program: Program) -> None:
    """Print which flags have no effect on this program."""
    if program.toolchain.protocol is not None:
        if program.project and options.module_root:
            _say("--module-root has no effect on a project, which has its own modules")
        return
    values = {option.flag: getattr(options, option.name) for option in OPTIONS if option.x07_only}
    unused = [name for name, value in values.items() if value not in (None, False, [])]
    if unused:
        _say(f"{', '.join(unused)}: no effect on {program.toolchain.name} programs, which have the policy's limits")


def _say(line: str) -> None:
    say(line, COMMAND)


def entry() -> NoReturn:
    """Run the command and exit with its code."""
    end_with(main, COMMAND)


if __name__ == "__main__":
    entry()
