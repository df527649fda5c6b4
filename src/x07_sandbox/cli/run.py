"""`x07 run` and `x07 exec`: run a program or an installed command, and exit with its exit code."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from x07_sandbox.backends.registry import backend_request, select, this_platform
from x07_sandbox.cli.console import LiveLine, say
from x07_sandbox.cli.parser import add_groups, add_help_levels, given_rows, help_level
from x07_sandbox.errors import Command, ImageError, SandboxError, UsageError, escaped
from x07_sandbox.host.paths import is_folder
from x07_sandbox.host.settings import SOURCE_MAX_BYTES
from x07_sandbox.host.variables import text
from x07_sandbox.host.waiting import cancelled_by_signals
from x07_sandbox.options import OF_X07, OPTIONS
from x07_sandbox.policy.outcomes import REFUSED_EXIT, ending_line
from x07_sandbox.sessions.request import RunCaller, loaded, make_request, toolchain_of_text
from x07_sandbox.sessions.run import carry_out, pool_machines
from x07_sandbox.sessions.transfers import read_all

if TYPE_CHECKING:
    from x07_sandbox.backends.registry import Choice
    from x07_sandbox.cli.parser import Parser
    from x07_sandbox.host.waiting import Cancel
    from x07_sandbox.sessions.request import Loader, RunRequest
    from x07_sandbox.sessions.result import Result

    Named = tuple[str | None, list[str]]


def add_run(parser: Parser) -> None:
    """Add the arguments of `x07 run`."""
    parser.description = "Build PROGRAM in one throw-away VM and run it in another."
    parser.usage = "x07 run [OPTIONS] PROGRAM [-- ARGS]"
    parser.late_epilog, parser.level_of = _epilog, help_level
    what = "source file, executable or project folder, or - for standard input"
    parser.add_argument("program", metavar="PROGRAM", nargs="?", help=what)
    parser.add_argument("args", nargs="*", metavar="ARGS", help="arguments of the program, after --")
    add_help_levels(parser, "all", "x07")
    add_groups(parser, "run")
    parser.set_defaults(command=[], carry_out=run_command)


def _epilog(level: str, command: str = "run") -> str:
    from x07_sandbox.cli.help import EXEC, of_run  # only for help

    return of_run(level) if command == "run" else EXEC


def add_exec(parser: Parser) -> None:
    """Add the arguments of `x07 exec`."""
    parser.description = "Run a command from the guest image in a throw-away VM. The command works in a copy of DIR."
    parser.usage = "x07 exec [--workdir DIR [--read]] [OPTIONS] -- COMMAND [ARGS]"
    parser.late_epilog, parser.level_of = lambda level: _epilog(level, "exec"), help_level
    parser.add_argument("command", nargs="*", metavar="COMMAND [ARGS]", help="the command and its arguments, after --")
    add_help_levels(parser, "all")
    add_groups(parser, "exec")
    parser.set_defaults(program=None, args=[], carry_out=_exec)


def _exec(options: argparse.Namespace) -> int:
    options.command = options.command or _command_of(options.image)
    if not options.command:
        raise UsageError("wrong usage", "no command given", _example("x07 exec --workdir . -- make test"))
    if options.read and options.workdir is None:
        raise UsageError("wrong usage", "--read requires --workdir", "Add --workdir DIR, or omit --read")
    return run_command(options)


def _command_of(image: str | None) -> list[str]:
    """Return the entrypoint and the command of an imported image; [] for any other."""
    if image is None:
        return []
    from x07_sandbox.images.store import find_image

    with contextlib.suppress(ImageError, UsageError):  # the run itself reports an image that is missing
        program = find_image(image).manifest.program
        return [] if program is None else [*program.entrypoint, *program.cmd]
    return []


def run_command(options: argparse.Namespace) -> int:
    """Carry out `x07 run` or `x07 exec` and return the exit code. Raises SandboxError."""
    try:
        return _dispatch(options)
    except SandboxError as exc:
        from x07_sandbox.cli.outputs import write_failure

        write_failure(options, exc)
        raise


def _dispatch(options: argparse.Namespace) -> int:
    """Run the program. Programs in the X07 language run by the rules of X07's own command. Raises SandboxError."""
    named = named_program(options)
    if _is_x07_artifact(options):
        from x07_sandbox.cli.run_report import with_x07_exits

        return with_x07_exits(options, lambda: _carry_out(options, named, for_x07=False))
    program, _ = named
    if program is None or options.code is not None or not is_x07_program(Path(program)):
        return _carry_out(options, named, for_x07=False)
    from x07_sandbox.cli.run_report import from_project, with_x07_exits

    from_project(options, Path(program))
    return with_x07_exits(options, lambda: _carry_out(options, named, for_x07=True))


def _carry_out(options: argparse.Namespace, named: Named, *, for_x07: bool) -> int:
    choice = choose_backend(options)
    outputs = _checked_outputs(options, named[0])
    with contextlib.ExitStack() as stack:
        if not options.dry_run:
            need_image(choice, options.image or text("X07_VM_GUEST_IMAGE"))
        caller = make_caller(options, stack, choice, for_x07=for_x07)
        request = request_of(options, named, caller.cancel)
        caller = replace(caller, stdin_fd=stdin_of(options, request, for_x07=for_x07))
        if options.dry_run:
            from x07_sandbox.cli.messages import show_plan

            return show_plan(request, caller, options)
        if _x07_options(options) and not caller.loaders:
            flags = ", ".join(row.flag for row in OF_X07)
            say(f"{flags} have no effect on this program, which has the policy's limits")
        report = options.report or options.attest_runtime or (for_x07 and not options.json)
        if report or for_x07 or outputs:
            request, caller = _loaded(request, caller, outputs, stack)
        if report:
            from x07_sandbox.cli.run_report import run_with_report

            return run_with_report(request, caller, options, stack)
        if options.compiled_out:
            from x07_sandbox.cli.outputs import artifact_file

            caller = replace(caller, artifact=artifact_file(stack))
        result, error = carry_out(request, caller, say)
        if for_x07 and isinstance(error, UsageError):
            from x07_sandbox.cli.run_report import x07_exit

            result = replace(result, x07_exit_code=x07_exit(error))
        write_errors: list[str] = []
        if caller.artifact is not None or options.diff or options.net_log or options.report_out:
            from x07_sandbox.cli.outputs import write_files

            result, write_errors = write_files(options, result, caller.artifact)
    if options.json and not options.quiet_json:
        from x07_sandbox.cli.outputs import print_result

        return print_result(result, full=options.json == "full")
    return report_run(result, error, write_errors)


def report_run(result: Result, error: SandboxError | None, write_errors: list[str]) -> int:
    """Print messages about a run; return the exit code. write_errors: a line for each file that was not written."""
    _explain(result, error)
    for line in write_errors:
        say(line)
    if result.denials or result.hints or (result.net is not None and result.net.failed):
        from x07_sandbox.cli.messages import say_denials

        say_denials(result)
    if result.changes.state != "none":
        from x07_sandbox.cli.messages import say_changes

        say_changes(result)
    if result.files_discarded.count and sys.stderr.isatty():
        count = result.files_discarded.count
        files = f"{count} files" if count > 1 else "1 file"
        keep = "to keep files, use --workdir DIR, or write to /x07/out and use --out DIR"
        say(f"discarded: {files} in the program's working folder; {keep}")
    lost = result.stdout.undelivered or result.stderr.undelivered
    return result.x07_exit_code or (REFUSED_EXIT if lost else 0)


def _loaded(
    request: RunRequest, caller: RunCaller, outputs: dict[str, Path | None], stack: contextlib.ExitStack
) -> tuple[RunRequest, RunCaller]:
    """Read the program before the run, and check that no output file overwrites a file of it. Raises SandboxError.

    Return the request with the settings of the project, and the caller with the program.
    """
    request, program = loaded(request, caller, stack)
    from x07_sandbox.cli.outputs import check_outputs, files_read

    if outputs:
        check_outputs(outputs, files_read(request, program, caller.stdin_fd))
    if program is None or program.toolchain.protocol is None:
        return request, replace(caller, program=program)
    from x07_sandbox.cli.run_report import with_derived_file

    request, policy = with_derived_file(request, program, program.toolchain.protocol)
    if outputs and isinstance(request.policy, Path):
        check_outputs(outputs, [request.policy])
    return request, replace(caller, program=program, policy=policy)


def _checked_outputs(options: argparse.Namespace, program: str | None) -> dict[str, Path | None]:
    """Return the output files by flag. Raises UsageError for a file that cannot be written or that the run reads."""
    outputs = {
        "--report-out": options.report_out,  # first: an error about another file is written there
        "--compiled-out": options.compiled_out,
        "--attest-runtime": options.attest_runtime,
        "--diff": options.diff,
        "for --diff": options.diff and Path(f"{options.diff}.json"),
        "--net-log": options.net_log,
    }
    if not any(outputs.values()):
        return {}
    from x07_sandbox.cli.outputs import check_outputs

    if options.dry_run:
        raise UsageError("wrong usage", "--dry-run writes nothing", "Omit the flags that name output files")
    read = [options.policy, *options.allow_host_file, *options.deny_host_file]
    if options.code is None:
        read.append("/dev/stdin" if program == "-" else program)
    check_outputs(outputs, [options.input, *(Path(name) for name in read if name)])
    return outputs


def is_x07_program(path: Path) -> bool:
    """Whether the program is in the X07 language. Callers of X07's command then expect X07's report."""
    if not (path.name.endswith("x07.json") or is_folder(path)):  # saves the import
        return False
    from x07_sandbox.x07.project import is_x07

    return is_x07(path)


def _require_one_program(program: str | None, toolchain: str | None) -> None:
    """Raise UsageError if -c is used together with a file that was probably meant as the program."""
    if toolchain is None and program is not None and Path(program).is_file():
        why = f"-c and {program} both give a program"
        raise UsageError(
            "wrong usage", why, f"Remove one of them. If {program} is an argument of the -c program, add --toolchain"
        )


def _is_x07_artifact(options: argparse.Namespace) -> bool:
    """Whether to run an executable made by X07's compiler and to report on it as X07's command does."""
    return options.artifact is not None and bool(options.report or options.attest_runtime)


def choose_backend(options: argparse.Namespace) -> Choice:
    """Return the backend that flags and variables select. Raises UsageError, RefusedError if it is not available."""
    accepted = options.i_accept_weaker_isolation
    found = backend_request(sandbox=options.sandbox_backend, backend=options.backend, accepted=accepted)
    choice = select(this_platform(), found)
    if choice.sandbox_backend == "none":
        say(
            "warning: there is no isolation, so the program can do whatever you can, and few limits of the policy apply"
        )
    return choice


def make_caller(
    options: argparse.Namespace, stack: contextlib.ExitStack, choice: Choice, *, for_x07: bool
) -> RunCaller:
    """Return the caller of the run, whose cancellation and progress *stack* ends."""
    cancel = stack.enter_context(cancelled_by_signals())
    progress = LiveLine()
    stack.callback(progress, "")
    return RunCaller(
        cancel=cancel,
        progress=progress,
        choice=choice,
        loaders=_loaders(options, for_x07=for_x07),
        machines=None if options.no_pool else pool_machines(),
        live_stdout=None if options.json else _stream(1),
        live_stderr=None if options.json else _stream(2),
    )


def request_of(options: argparse.Namespace, named: Named, cancel: Cancel) -> RunRequest:
    """Return the request for the run. named: the value of `named_program`. Raises UsageError."""
    program, words = named
    source: bytes | None = None
    toolchain = options.toolchain
    if options.artifact:
        if toolchain not in {None, "executable"}:
            why = f"--artifact is an executable, which --toolchain {toolchain} does not accept"
            raise UsageError("wrong usage", why, "Omit --toolchain, or give the program without --artifact")
        toolchain = "executable"
    if options.code is not None:
        _require_one_program(program, toolchain)
        words = [*([program] if program is not None else []), *words]
        program, source = None, options.code.encode("utf-8", "surrogateescape")
    elif program == "-":
        if options.stdin:
            why = "standard input is the source, so it cannot be the program's input too"
            raise UsageError("wrong usage", why, "Omit --stdin, or give the source with -c")
        toolchain_of_text(toolchain)  # before it waits for input
        with cancel.waiting():
            program, source = None, _source_from_stdin() if toolchain else b""  # without, the run is refused
    elif program is None and not options.command:
        raise _no_program()
    return make_request(
        given_rows(options, OPTIONS),
        program=None if program is None else Path(program),
        command=tuple(options.command),
        source=source,
        toolchain=toolchain,
        args=tuple(words),
        **({} if options.input_b64 is None else {"input": _decoded(options.input_b64)}),
        executable=options.compiled_out is not None,
        cache=not options.no_cache,
    )


def stdin_of(options: argparse.Namespace, request: RunRequest, *, for_x07: bool) -> int | None:
    """Return the descriptor of the program's standard input, unless the input is given in another way."""
    if options.code is None and request.source is not None:  # it was the source
        return None
    stdin_fd = _stream(0)
    if stdin_fd is None or options.stdin or not os.isatty(stdin_fd):
        return stdin_fd
    if for_x07 or options.report or options.attest_runtime:
        return None  # X07's command reads pipes, not terminals
    # We read ahead of the program, so SIGTTIN would stop a run in the background (`&`) while its VM continues. If
    # the signal is ignored, read(2) fails instead, which ends the input.
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTTIN, signal.SIG_IGN)
    return stdin_fd


def named_program(options: argparse.Namespace) -> Named:
    """Return the program, or None for -c and `x07 exec`, and its arguments. Raises UsageError.

    PROGRAM or one of X07's flags names the program. Otherwise it is the X07 project around the current folder.
    """
    if options.world != "run-os-sandboxed":
        why, fix = "x07-sandbox implements only run-os-sandboxed", "Use --world run-os-sandboxed, or omit it"
        raise UsageError(f"cannot run in the world {options.world}", why, fix)
    code = options.code
    named = [value for value in (options.program_flag, options.project, options.artifact) if value is not None]
    if len(named) + (code is not None) > 1:
        fix = "Use only one of -c, --program, --project, --artifact"
        raise UsageError("wrong usage", "more than one program given", fix)
    if options.command:
        return None, []
    program = named[0] if named else options.program
    if program == "" and code is None:  # as from an unset shell variable: it does not mean this folder
        raise UsageError("wrong usage", "PROGRAM is empty", _example("x07 run prog.py"))
    if not named:
        _refuse_command(options)
        nothing = options.program is None and code is None
        return _project_here() if nothing else options.program, options.args
    return program, [*([] if options.program is None else [options.program]), *options.args]


def _refuse_command(options: argparse.Namespace) -> None:
    """Raise UsageError if PROGRAM is not a file but looks like a command of the image, such as `make test`."""
    program, words = options.program, options.args
    no_command = not program or program == "-" or {"/", "."} & set(program)
    if options.code is not None or no_command or os.path.lexists(program):
        return
    from shutil import which

    if not (words or which(program)):
        return
    from shlex import join

    command = Command(f"x07 exec --workdir . -- {join([program, *words])}")
    fix = ("To run a command installed in the image: ", command)
    raise UsageError(f"cannot run {program}", f"there is no file named {program!r} in this folder", fix)


def _project_here() -> str | None:
    """Return the manifest of the X07 project around the current folder, or None. Raises UsageError."""
    from x07_sandbox.host.paths import is_file
    from x07_sandbox.programs.project import X07_JSON, project_root

    manifest = project_root(None) / X07_JSON
    return str(manifest) if is_file(manifest) else None


def _x07_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return those options for X07's compiler that the user gave."""
    values = {row.name: getattr(options, row.name) for row in OF_X07}
    return {name: value for name, value in values.items() if value is not None}


def _loaders(options: argparse.Namespace, *, for_x07: bool) -> tuple[Loader, ...]:
    """Return the loader of X07's programs if it is needed. Runs of other programs do not import the loader."""
    if not (for_x07 or _is_x07_artifact(options)):
        return ()
    from functools import partial

    from x07_sandbox.x07.programs import load_artifact, load_x07
    from x07_sandbox.x07.project import Options

    return (partial(load_x07 if for_x07 else load_artifact, options=Options(**_x07_options(options))),)


def _example(command: str) -> tuple[str, ...]:
    return "For example: ", Command(command)


def _no_program() -> UsageError:
    """Return the error for a missing PROGRAM. Only X07 projects may omit PROGRAM, as with X07's own command."""
    from x07_sandbox.programs.project import FILE

    fix = _example("x07 run prog.py")
    if os.path.lexists(FILE):
        fix = ("To run the project in this folder: ", Command("x07 run ."))
    return UsageError("wrong usage", "PROGRAM is missing", fix)


def _source_from_stdin() -> bytes:
    """Read the program's source from standard input, for PROGRAM `-`. Raises UsageError."""
    try:
        source = read_all(0, SOURCE_MAX_BYTES)
    except OSError as exc:
        raise UsageError(
            "cannot read the source", exc.strerror or str(exc), "Pipe the source to standard input"
        ) from exc
    if not source:
        raise UsageError("cannot run the source", "standard input is empty", "Pipe the source to standard input")
    return source


def _decoded(text: str) -> bytes:
    import binascii  # seldom needed

    try:
        return binascii.a2b_base64(text.encode(), strict_mode=True)
    except (binascii.Error, UnicodeEncodeError) as exc:
        raise UsageError(
            "cannot use --input-b64", f"it is not base64 ({exc})", "Encode the input with base64 -w0"
        ) from exc


def _stream(fd: int) -> int | None:
    try:
        os.fstat(fd)
    except OSError:
        return None  # the caller has closed it
    return fd


def need_image(choice: Choice, ref: str | None) -> None:
    """On a terminal, build or update the default image if the run needs it. Elsewhere, a run without it is refused."""
    from x07_sandbox.images.store import find_image, image_is_current

    backend = choice.made
    if ref is not None or not sys.stderr.isatty() or not backend.uses_image or backend.engine_images is not None:
        return
    from x07_sandbox.cli.image import build_with_progress

    try:
        if image_is_current(find_image(None)):
            return
    except ImageError:
        say("building the guest image; this takes about a minute")
    build_with_progress("default", None)


def _explain(result: Result, error: SandboxError | None) -> None:
    """Print warnings, the output of a failed build and, unless the program exited by itself, how the run ended."""
    for output in (result.stdout.data, result.stderr.data) if result.outcome == "build-failed" else ():
        if output:
            text = output.decode("utf-8", "surrogateescape").removesuffix("\n")
            with contextlib.suppress(OSError):
                sys.stderr.write(escaped(text, kept="\n\t") + "\n")
    if result.input_problem:
        say(f"the input could not be read to its end: {result.input_problem}")
    for name, stream in (("standard output", result.stdout), ("standard error", result.stderr)):
        if stream.undelivered:
            say(f"could not write the program's {name}: {stream.undelivered}")
    if result.outcome == "ok" or (result.outcome == "failed" and result.program_started):
        return
    say(ending_line(result.outcome, result.reason_code, result.reason, error), bad=f"{result.outcome}:")
