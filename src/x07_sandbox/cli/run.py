"""`x07 run` and `x07 exec`: run a program or an installed command, and exit with its exit code."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import replace

from x07_sandbox.backends.lease import PoolClient
from x07_sandbox.backends.registry import create
from x07_sandbox.backends.selection import backend_request, select, this_platform
from x07_sandbox.cli.cancel import cancelled_by_signals
from x07_sandbox.cli.console import LiveLine, plain, say
from x07_sandbox.cli.run_options import (
    OVERRIDES,
    X07_LIMITS,
    add_command_options,
    add_options,
    epilog,
    help_level,
    limits_of,
)
from x07_sandbox.errors import ImageError, SandboxError, UsageError
from x07_sandbox.host.paths import is_folder
from x07_sandbox.host.settings import SOURCE_MAX_BYTES
from x07_sandbox.host.variables import text
from x07_sandbox.housekeeping.start import sweep_before_start
from x07_sandbox.plan.outcomes import REFUSED_EXIT, ending_line
from x07_sandbox.runs.program import load_program, toolchain_of_text
from x07_sandbox.runs.request import RunRequest
from x07_sandbox.runs.run import attempt
from x07_sandbox.runs.streams import memory_file, read_all

if TYPE_CHECKING:
    from x07_sandbox.backends.selection import Choice
    from x07_sandbox.cli.parser import Parser
    from x07_sandbox.host.cancel import Cancel
    from x07_sandbox.runs.program import Program
    from x07_sandbox.runs.request import Loader
    from x07_sandbox.runs.result import Result


_EXEC_EXAMPLES: Final = """examples:
  x07 exec --workdir . -- make test              run the project's tests; changes are copied back
  x07 exec --workdir proj --read -- grep -rn main src
  x07 exec --workdir . --changes keep -- sh -c './configure && make'
  x07 diff                                       show what the last command changed
  x07 exec --workdir . --timeout 600 --memory 1G -- make -j2
  x07 exec -- python3 --version                  without --workdir: start in an empty folder

If the command has no slash, x07 looks it up in the image. If it has one, as in ./configure, x07 looks it up in
DIR. To add Debian packages to the image, use x07 image build --include. Relative paths in --allow-read-root and
--allow-write-root start in DIR. The exit code is that of the command, or 127 if there is no such command.
See docs/how-to/run-a-command.md.
"""


def add_run(parser: Parser) -> None:
    """Add the arguments of `x07 run`."""
    parser.description = "Build PROGRAM in one throw-away VM and run it in another."
    parser.usage = "x07 run [OPTIONS] PROGRAM [-- ARGS]"
    parser.late_epilog = epilog
    parser.level_of = help_level
    add_options(parser)
    parser.set_defaults(carry_out=run_command)


def add_exec(parser: Parser) -> None:
    """Add the arguments of `x07 exec`."""
    parser.description = "Run a command from the guest image in a throw-away VM. The command works in a copy of DIR."
    parser.usage = "x07 exec [--workdir DIR [--read]] [OPTIONS] -- COMMAND [ARGS]"
    parser.late_epilog = lambda _level: _EXEC_EXAMPLES
    parser.level_of = help_level
    add_command_options(parser)
    parser.set_defaults(carry_out=_exec)


def _exec(options: argparse.Namespace) -> int:
    if not options.command:
        raise UsageError("wrong usage", "no command given", "For example: x07 exec --workdir . -- make test")
    if options.read and options.workdir is None:
        raise UsageError("wrong usage", "--read requires --workdir", "Add --workdir DIR, or omit --read")
    return run_command(options)


def run_command(options: argparse.Namespace) -> int:
    """Carry out `x07 run` or `x07 exec` and return the exit code. Raises SandboxError."""
    try:
        return _dispatch(options)
    except SandboxError as exc:
        from x07_sandbox.cli.run_failure import write_failure

        write_failure(options, exc)
        raise


def _dispatch(options: argparse.Namespace) -> int:
    """Run the program. Programs in the X07 language run by the rules of X07's own command. Raises SandboxError."""
    program, _ = _named(options)
    if _is_x07_artifact(options):
        from x07_sandbox.cli.run_report import with_x07_exits

        return with_x07_exits(options, lambda: _carry_out(options, for_x07=False))
    if program is None or options.code is not None or not _is_x07(Path(program)):
        return _carry_out(options, for_x07=False)
    from x07_sandbox.cli.run_report import from_project, with_x07_exits

    from_project(options, Path(program))
    return with_x07_exits(options, lambda: _carry_out(options, for_x07=True))


def _carry_out(options: argparse.Namespace, *, for_x07: bool) -> int:
    choice = _choice(options)
    outputs = _checked_outputs(options)
    with contextlib.ExitStack() as stack:
        if not options.dry_run:
            _need_image(choice, options.image or text("X07_VM_GUEST_IMAGE"))
        cancel = stack.enter_context(cancelled_by_signals())
        progress = LiveLine()
        stack.callback(progress, "")
        request = replace(_request(options, stack, cancel, progress, for_x07=for_x07), choice=choice)
        if options.dry_run:
            from x07_sandbox.cli.dry_run import show_plan

            return show_plan(request, options)
        if _x07_options(options) and not request.loaders:
            say(f"{', '.join(X07_LIMITS)}, --auto-ffi have no effect on this program, which has the policy's limits")
        sweep_before_start(say)
        report = options.report or options.attest_runtime or (for_x07 and not options.json)
        if report or for_x07 or outputs:
            request, program = _loaded(request, outputs, stack)
            if report:
                from x07_sandbox.cli.run_report import run_with_report

                return run_with_report(request, program, options, stack)
            request = replace(request, loaded=program)
        artifact = None
        if options.compiled_out:
            from x07_sandbox.cli.atomic_output import artifact_file

            artifact = artifact_file(stack)
            request = replace(request, artifact=artifact)
        result, error = attempt(request)
        if for_x07 and isinstance(error, UsageError):
            from x07_sandbox.cli.run_report import x07_exit

            result = replace(result, x07_exit_code=x07_exit(error))
        write_errors: list[str] = []
        if artifact is not None or options.diff or options.net_log or options.report_out:
            from x07_sandbox.cli.run_outputs import write_files

            result, write_errors = write_files(options, result, artifact)
    if options.json and not options.quiet_json:
        from x07_sandbox.cli.run_failure import print_result

        return print_result(result, full=options.json == "full")
    return _report(result, write_errors)


def _report(result: Result, write_errors: list[str]) -> int:
    """Print messages about a run; return the exit code. write_errors: a line for each file that was not written."""
    _explain(result)
    for line in write_errors:
        say(line)
    if result.denials or result.hints or (result.net is not None and result.net.failed):
        from x07_sandbox.cli.denials_text import say_denials

        say_denials(result)
    if result.changes.state != "none":
        from x07_sandbox.cli.changes_text import say_changes

        say_changes(result)
    if result.files_discarded.count and sys.stderr.isatty():
        count = result.files_discarded.count
        files = f"{count} files" if count > 1 else "1 file"
        keep = "to keep files, use --workdir DIR, or write to /x07/out and use --out DIR"
        say(f"discarded: {files} in the program's working folder; {keep}")
    lost = result.stdout.undelivered or result.stderr.undelivered
    return result.x07_exit_code or (REFUSED_EXIT if lost else 0)


def _loaded(
    request: RunRequest, outputs: dict[str, Path | None], stack: contextlib.ExitStack
) -> tuple[RunRequest, Program]:
    """Read the program before the run, and check that no output file overwrites a file of it. Raises SandboxError."""
    request, program = load_program(request, stack)
    from x07_sandbox.cli.atomic_output import check_outputs, files_read

    if outputs:
        check_outputs(outputs, files_read(request, program))
    if program.toolchain.protocol is not None:
        from x07_sandbox.cli.run_report import with_derived_file

        request = with_derived_file(request, program, program.toolchain.protocol)
        if outputs and isinstance(request.policy, Path):
            check_outputs(outputs, [request.policy])
    return request, program


def _checked_outputs(options: argparse.Namespace) -> dict[str, Path | None]:
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
    from x07_sandbox.cli.atomic_output import check_outputs

    if options.dry_run:
        raise UsageError("wrong usage", "--dry-run writes nothing", "Omit the flags that name output files")
    program = _named(options)[0] if options.code is None else None
    named = ["/dev/stdin" if program == "-" else program, options.policy]
    named += [*options.allow_host_file, *options.deny_host_file]
    check_outputs(outputs, [options.input, *(Path(name) for name in named if name)])
    return outputs


def _is_x07(path: Path) -> bool:
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


def _choice(options: argparse.Namespace) -> Choice:
    """Return the backend that flags and variables select. Raises UsageError, RefusedError if it is not available."""
    accepted = options.i_accept_weaker_isolation
    found = backend_request(sandbox=options.sandbox_backend, backend=options.backend, accepted=accepted)
    choice = select(this_platform(), found)
    if choice.sandbox_backend == "none":
        say(
            "warning: there is no isolation, so the program can do whatever you can, and few limits of the policy apply"
        )
    return choice


def _request(
    options: argparse.Namespace, stack: contextlib.ExitStack, cancel: Cancel, progress: LiveLine, *, for_x07: bool
) -> RunRequest:
    """Return the request for the run. Raises UsageError."""
    program, words = _named(options)
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
    stdin_fd = None if options.code is None and source is not None else _stream(0)
    as_x07 = for_x07 or options.report or options.attest_runtime
    if as_x07 and stdin_fd is not None and not options.stdin and os.isatty(stdin_fd):
        stdin_fd = None  # X07's command reads pipes, not terminals
    if stdin_fd is not None and not options.stdin and os.isatty(stdin_fd):
        # We read ahead of the program, so SIGTTIN would stop a run in the background (`&`) while its VM continues. If
        # the signal is ignored, read(2) fails instead, which ends the input.
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTTIN, signal.SIG_IGN)
    if options.input_b64 is not None:
        stdin_fd = memory_file(_decoded(options.input_b64), stack)
    return RunRequest(
        program=None if program is None else Path(program),
        command=tuple(options.command),
        source=source,
        workdir=options.workdir,
        workdir_read=options.read,
        toolchain=toolchain,
        args=tuple(words),
        policy=options.policy,
        **_overrides(options),
        env=dict(map(_variable, options.env)),
        image=options.image,
        ca=options.ca,
        **limits_of(options),
        input=options.input,
        stdin_fd=stdin_fd,
        stdin_default=not (options.stdin or options.input_b64 is not None),
        live_stdout=None if options.json else _stream(1),
        live_stderr=None if options.json else _stream(2),
        raw=options.raw,
        max_output_bytes=options.max_output_bytes,
        executable=options.compiled_out is not None,
        cold=options.cold,
        cache=not options.no_cache,
        queue_s=options.queue_timeout,
        machines=None if options.no_pool else PoolClient(),
        require_hardware=options.require_hardware,
        profile=options.profile,
        changes=options.changes,
        out=options.out,
        allow_protected=tuple(options.allow_protected),
        hide=tuple(options.hide),
        reveal=tuple(options.reveal),
        loaders=_loaders(options, for_x07=for_x07),
        progress=progress,
        cancel=cancel,
    )


def _named(options: argparse.Namespace) -> tuple[str | None, list[str]]:
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
        raise UsageError("wrong usage", "PROGRAM is empty", "For example: x07 run prog.py")
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

    fix = f"To run a command installed in the image: x07 exec --workdir . -- {join([program, *words])}"
    raise UsageError(f"cannot run {program}", f"there is no file named {program!r} in this folder", fix)


def _project_here() -> str | None:
    """Return the manifest of the X07 project around the current folder, or None. Raises UsageError."""
    from x07_sandbox.host.documents import MANIFEST, project_root
    from x07_sandbox.host.paths import is_file

    manifest = project_root(None) / MANIFEST
    return str(manifest) if is_file(manifest) else None


def _x07_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return those options for X07's compiler that the user gave."""
    keys = [name[2:].replace("-", "_") for name in (*X07_LIMITS, "--auto-ffi")]
    return {key: getattr(options, key) for key in keys if getattr(options, key) is not None}


def _loaders(options: argparse.Namespace, *, for_x07: bool) -> tuple[Loader, ...]:
    """Return the loader of X07's programs if it is needed. Runs of other programs do not import the loader."""
    if not (for_x07 or _is_x07_artifact(options)):
        return ()
    from functools import partial

    from x07_sandbox.x07.programs import load_artifact, load_x07
    from x07_sandbox.x07.project import Options

    return (partial(load_x07 if for_x07 else load_artifact, options=Options(**_x07_options(options))),)


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of RunRequest for the flags that change the policy."""
    keys = {flag: flag[2:].replace("-", "_") for flag, _, _ in OVERRIDES}
    given = {flag: key for flag, key in keys.items() if getattr(options, key)}
    copied = tuple(word for word in ("hidden", "symlinks") if getattr(options, f"allow_{word}"))
    if not (given or copied):
        return {}
    from x07_sandbox.policy.overrides import Overrides

    overrides = Overrides(**{key: tuple(getattr(options, key)) for key in given.values()}, include=copied)
    return {"overrides": overrides, "override_flags": (*given, *(f"--allow-{word}" for word in copied))}


def _no_program() -> UsageError:
    """Return the error for a missing PROGRAM. Only X07 projects may omit PROGRAM, as with X07's own command."""
    from x07_sandbox.programs.manifest import FILE

    fix = "For example: x07 run prog.py"
    if os.path.lexists(FILE):
        fix = "To run the project in this folder: x07 run ."
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


def _variable(text: str) -> tuple[str, str]:
    """Parse a value of --env: NAME=VALUE, or NAME to take the value from our environment. Raises UsageError."""
    name, equals, value = text.partition("=")
    if equals:
        return name, value
    if name not in os.environ:
        raise UsageError(f"cannot use --env {name}", "the variable is not set here", f"Use --env {name}=VALUE")
    return name, os.environ[name]


def _stream(fd: int) -> int | None:
    try:
        os.fstat(fd)
    except OSError:
        return None  # the caller has closed it
    return fd


def _need_image(choice: Choice, ref: str | None) -> None:
    """On a terminal, build or update the default image if the run needs it. Elsewhere, a run without it is refused."""
    from x07_sandbox.images.store import find_image, image_is_current

    backend = create(choice.backend)
    if ref is not None or not sys.stderr.isatty() or not backend.uses_image or backend.engine_images is not None:
        return
    from x07_sandbox.cli.image import build_with_progress

    try:
        if image_is_current(find_image(None)):
            return
    except ImageError:
        say("building the guest image; this takes about a minute")
    build_with_progress("default", None)


def _explain(result: Result) -> None:
    """Print warnings, the output of a failed build and, unless the program exited by itself, how the run ended."""
    for output in (result.stdout.data, result.stderr.data) if result.outcome == "build-failed" else ():
        if output:
            with contextlib.suppress(OSError):
                sys.stderr.write(plain(output.decode("utf-8", "replace")).removesuffix("\n") + "\n")
    for warning in result.warnings:
        if warning.startswith("the input"):
            say(warning)
    for name, stream in (("standard output", result.stdout), ("standard error", result.stderr)):
        if stream.undelivered:
            say(f"could not write the program's {name}: {stream.undelivered}")
    if result.outcome == "ok" or (result.outcome == "failed" and result.program_started):
        return
    say(ending_line(result.outcome, result.reason), bad=f"{result.outcome}:")
