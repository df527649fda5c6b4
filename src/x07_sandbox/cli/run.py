"""`x07 run`: run one program and end as it ended."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from x07_sandbox.backends.lease import PoolMachines
from x07_sandbox.backends.registry import create
from x07_sandbox.backends.selection import asked, select, this_platform
from x07_sandbox.cli.cancel import cancelled_by_signals
from x07_sandbox.cli.console import LiveLine, plain, say
from x07_sandbox.cli.run_options import OVERRIDES, X07_LIMITS, add_options, epilog, help_level, limits_of
from x07_sandbox.errors import ImageError, SandboxError, UsageError
from x07_sandbox.host.paths import is_folder
from x07_sandbox.host.settings import SOURCE_MAX_BYTES
from x07_sandbox.host.variables import text
from x07_sandbox.housekeeping.start import sweep_before_start
from x07_sandbox.runs.program import load_program
from x07_sandbox.runs.request import RunRequest
from x07_sandbox.runs.run import attempt
from x07_sandbox.runs.streams import memory_file, read_all

if TYPE_CHECKING:
    from x07_sandbox.backends.selection import Choice
    from x07_sandbox.host.cancel import Cancel
    from x07_sandbox.runs.program import Program
    from x07_sandbox.runs.request import Loader
    from x07_sandbox.runs.result import Result


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser], *, help: str) -> None:  # noqa: A002
    """Add the verb."""
    parser = verbs.add_parser(
        "run",
        help=help,
        description="Build PROGRAM in one throw-away virtual machine and run it in another.",
        usage="x07 run [OPTIONS] PROGRAM [-- ARGS]",
        late_epilog=epilog,
        level_of=help_level,
    )
    add_options(parser)
    parser.set_defaults(carry_out=run_command)


def run_command(options: argparse.Namespace) -> int:
    """Carry out `x07 run` or `x07 exec`; the exit code. Raises SandboxError."""
    try:
        return _chosen(options)
    except SandboxError as exc:
        from x07_sandbox.cli.run_failure import write_failure

        write_failure(options, exc)
        raise


def _chosen(options: argparse.Namespace) -> int:
    """Run what is named, by the rules of X07's command if it is X07's. Raises SandboxError."""
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
            say(f"{', '.join(X07_LIMITS)}, --auto-ffi bind X07 programs only; this one has the policy's limits")
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
            from x07_sandbox.cli.atomic_output import place_for_artifact

            artifact = place_for_artifact(stack)
            request = replace(request, artifact=artifact)
        result, error = attempt(request)
        if for_x07 and isinstance(error, UsageError):
            from x07_sandbox.cli.run_report import x07_exit

            result = replace(result, x07_exit_code=x07_exit(error))
        unwritten: list[str] = []
        if artifact is not None or options.diff or options.net_log or options.report_out:
            from x07_sandbox.cli.run_outputs import write_files

            result, unwritten = write_files(options, result, artifact)
    if options.json and not options.quiet_json:
        from x07_sandbox.cli.run_failure import print_result

        return print_result(result, full=options.json == "full")
    return _told(result, unwritten)


def _told(result: Result, unwritten: list[str]) -> int:
    """Say what the program's own output does not; the exit code. unwritten: a line for each file that was not."""
    _explain(result)
    for line in unwritten:
        say(line)
    if result.denials or result.hints:
        from x07_sandbox.cli.denials_text import tell as tell_refused

        tell_refused(result)
    if result.changes.state != "none":
        from x07_sandbox.cli.changes_text import tell

        tell(result)
    if result.files_discarded.count and sys.stderr.isatty():
        count = result.files_discarded.count
        files = f"{count} files" if count > 1 else "1 file"
        keep = "keep such with --workdir DIR, or write to /x07/out with --out DIR"
        say(f"thrown away: {files} in the program's working folder; {keep}")
    from x07_sandbox.plan.outcomes import REFUSED_EXIT  # loaded by now, while the machine came up

    lost = result.stdout.undelivered or result.stderr.undelivered
    return result.x07_exit_code or (REFUSED_EXIT if lost else 0)


def _loaded(
    request: RunRequest, outputs: dict[str, Path | None], stack: contextlib.ExitStack
) -> tuple[RunRequest, Program]:
    """The program, read before the run, since it says what else may not be written over. Raises SandboxError."""
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
    """The files to be written, by their flags. Raises UsageError for one that cannot be, or that the run reads."""
    files = options.report_out, options.compiled_out, options.attest_runtime, options.diff, options.net_log
    if all(path is None for path in files):
        return {}
    from x07_sandbox.cli.atomic_output import check_outputs

    if options.dry_run:
        raise UsageError("wrong usage", "--dry-run writes nothing", "Leave the names of files out")
    outputs = {
        "--report-out": options.report_out,  # first: an error about another is written there
        "--compiled-out": options.compiled_out,
        "--attest-runtime": options.attest_runtime,
        "--diff": options.diff,
        "beside that of --diff": options.diff and Path(f"{options.diff}.json"),
        "--net-log": options.net_log,
    }
    program = _named(options)[0] if options.code is None else None
    named = ["/dev/stdin" if program == "-" else program, options.policy]
    named += [*options.allow_host_file, *options.deny_host_file]
    check_outputs(outputs, [options.input, *(Path(name) for name in named if name)])
    return outputs


def _is_x07(path: Path) -> bool:
    """Whether the program is one of X07's own, whose report is what callers of X07's command expect."""
    if not (path.name.endswith("x07.json") or is_folder(path)):  # others need not wait for that import
        return False
    from x07_sandbox.x07.project import is_x07

    return is_x07(path)


def _is_x07_artifact(options: argparse.Namespace) -> bool:
    """Whether an executable is named that X07 compiled before: what is asked for is X07's report of it."""
    return options.artifact is not None and bool(options.report or options.attest_runtime)


def _choice(options: argparse.Namespace) -> Choice:
    """The backend that is asked for. Raises UsageError, RefusedError where it is not to be had."""
    accepted = options.i_accept_weaker_isolation
    found = asked(sandbox=options.sandbox_backend, backend=options.backend, accepted=accepted)
    choice = select(this_platform(), found)
    if choice.sandbox_backend == "none":
        say("warning: no isolation: the program can do whatever this user can, and few of the policy's limits hold")
    return choice


def _request(
    options: argparse.Namespace, stack: contextlib.ExitStack, cancel: Cancel, progress: LiveLine, *, for_x07: bool
) -> RunRequest:
    """What the command line asks for. Raises UsageError."""
    program, words = _named(options)
    source: bytes | None = None
    toolchain = options.toolchain
    if options.artifact:
        if toolchain not in {None, "executable"}:
            why = f"--artifact names an executable, and --toolchain {toolchain} takes none"
            raise UsageError("wrong usage", why, "Name the program as PROGRAM, without --artifact")
        toolchain = "executable"
    if options.code is not None:
        words = [*([program] if program is not None else []), *words]
        program, source = None, options.code.encode("utf-8", "surrogateescape")
    elif program == "-":
        if options.stdin:
            why = "standard input is the source, so it cannot be the program's input too"
            raise UsageError("wrong usage", why, "Leave --stdin out, or give the source with -c")
        with cancel.waiting():
            program, source = None, _source_from_stdin()
    elif program is None and not options.command:
        raise _nothing_named()
    stdin_fd = None if options.code is None and source is not None else _stream(0)
    as_x07 = for_x07 or options.report or options.attest_runtime
    if as_x07 and stdin_fd is not None and not options.stdin and os.isatty(stdin_fd):
        stdin_fd = None  # X07's command takes what is piped in; who sits there was not asked to type anything
    if stdin_fd is not None and not options.stdin and os.isatty(stdin_fd):
        # A terminal that is another's turn is the end of the input. We read whether the program wants it or not: else
        # the next line that is typed would stop a run behind which `&` was typed, and its machine would go on.
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
        machines=None if options.no_pool else PoolMachines(),
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
    """The program, by PROGRAM, X07's flags or the X07 project here, and its arguments. Raises UsageError."""
    if options.world != "run-os-sandboxed":
        why = "run-os-sandboxed is the only world that x07-sandbox implements"
        fix = "Use --world run-os-sandboxed, or leave it out"
        raise UsageError(f"cannot run in the world {options.world}", why, fix)
    code = options.code
    named = [value for value in (options.program_flag, options.project, options.artifact) if value is not None]
    if len(named) + (code is not None) > 1:
        fix = "Give one of -c, --program, --project, --artifact"
        raise UsageError("wrong usage", "more than one program is named", fix)
    if options.command:
        return None, []
    program = named[0] if named else options.program
    if program == "" and code is None:  # what an unset variable of a shell makes: it does not mean this folder
        raise UsageError("wrong usage", "the name of the program is empty", "Name one")
    if not named:
        _refuse_command(options)
        nothing = options.program is None and code is None
        return _project_here() if nothing else options.program, options.args
    return program, [*([] if options.program is None else [options.program]), *options.args]


def _refuse_command(options: argparse.Namespace) -> None:
    """Raise UsageError for what looks like a command of the image, and is no file here: make test."""
    program, words = options.program, options.args
    no_command = not program or program == "-" or {"/", "."} & set(program)
    if options.code is not None or no_command or os.path.lexists(program):
        return
    from shutil import which

    if not (words or which(program)):
        return
    from shlex import join

    fix = f"To run a command of the image: x07 exec --workdir . -- {join([program, *words])}"
    raise UsageError(f"cannot run {program}", f"there is no file {program} here", fix)


def _project_here() -> str | None:
    """The X07 project that this folder belongs to, if it does. Raises UsageError."""
    from x07_sandbox.host.documents import MANIFEST, project_root
    from x07_sandbox.host.paths import is_file

    manifest = project_root(None) / MANIFEST
    return str(manifest) if is_file(manifest) else None


def _x07_options(options: argparse.Namespace) -> dict[str, Any]:
    """What X07's compiler is told; nothing for most programs."""
    keys = [name[2:].replace("-", "_") for name in (*X07_LIMITS, "--auto-ffi")]
    return {key: getattr(options, key) for key in keys if getattr(options, key) is not None}


def _loaders(options: argparse.Namespace, *, for_x07: bool) -> tuple[Loader, ...]:
    """What reads the program if it is X07's; nothing is loaded for others."""
    if not (for_x07 or _is_x07_artifact(options)):
        return ()
    from functools import partial

    from x07_sandbox.x07.programs import load_artifact, load_x07
    from x07_sandbox.x07.project import Options

    return (partial(load_x07 if for_x07 else load_artifact, options=Options(**_x07_options(options))),)


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    """What a request has of the flags that change the policy; nothing where none was given."""
    keys = {flag: flag[2:].replace("-", "_") for flag, _, _ in OVERRIDES}
    given = {flag: key for flag, key in keys.items() if getattr(options, key)}
    include = tuple(word for word in ("hidden", "symlinks") if getattr(options, f"allow_{word}"))
    if not (given or include):
        return {}
    from x07_sandbox.policy.overrides import Overrides

    overrides = Overrides(**{key: tuple(getattr(options, key)) for key in given.values()}, include=include)
    return {"overrides": overrides, "override_flags": (*given, *(f"--allow-{word}" for word in include))}


def _nothing_named() -> UsageError:
    """Without PROGRAM only a project of X07's is taken, as its own command does; one of ours is named by its folder."""
    from x07_sandbox.programs.manifest import FILE

    fix = "Try x07 run prog.py"
    if os.path.lexists(FILE):
        fix = f"Try x07 run . for the project of the {FILE} here"
    return UsageError("no program given", "PROGRAM is missing, and there is no x07.json here", fix)


def _source_from_stdin() -> bytes:
    """The source that PROGRAM `-` stands for. Raises UsageError."""
    try:
        source = read_all(0, SOURCE_MAX_BYTES)
    except OSError as exc:
        raise UsageError("cannot read the source", exc.strerror or str(exc), "Pipe it to standard input") from exc
    if not source:
        raise UsageError("cannot run the source", "standard input is empty", "Pipe it to standard input")
    return source


def _decoded(text: str) -> bytes:
    import binascii  # a file of its own in some Pythons, and hardly ever wanted

    try:
        return binascii.a2b_base64(text.encode(), strict_mode=True)
    except (binascii.Error, UnicodeEncodeError) as exc:
        why = f"it is no base64: {exc}"
        raise UsageError("cannot use --input-b64", why, "Encode the input with base64 -w0") from exc


def _variable(text: str) -> tuple[str, str]:
    """NAME=VALUE, or NAME for the value that it has here. Raises UsageError."""
    name, equals, value = text.partition("=")
    if equals:
        return name, value
    if name not in os.environ:
        raise UsageError(f"cannot use --env {name}", "there is no such variable here", "Give NAME=VALUE, or set it")
    return name, os.environ[name]


def _stream(fd: int) -> int | None:
    try:
        os.fstat(fd)
    except OSError:
        return None  # closed by whoever started us
    return fd


def _need_image(choice: Choice, ref: str | None) -> None:
    """On a terminal, make or renew the default image; elsewhere the run is refused without one."""
    from x07_sandbox.images.store import find_image, image_is_current

    backend = create(choice.backend)
    if ref is not None or not sys.stderr.isatty() or not backend.uses_image or backend.engine_images is not None:
        return
    from x07_sandbox.cli.image import build_with_progress

    try:
        if image_is_current(find_image(None)):
            return
    except ImageError:
        say("there is no guest image yet; building it takes about a minute")
    build_with_progress("default", None)


def _explain(result: Result) -> None:
    """Say on standard error what the exit code alone does not; nothing when the program ended by itself."""
    # What a compiler said; it quotes a source, which may be of any encoding.
    for said in (result.stdout.data, result.stderr.data) if result.outcome == "build-failed" else ():
        if said:
            with contextlib.suppress(OSError):
                sys.stderr.write(plain(said.decode("utf-8", "replace")).removesuffix("\n") + "\n")
    for warning in result.warnings:
        if warning.startswith("the input"):
            say(warning)
    for name, stream in (("standard output", result.stdout), ("standard error", result.stderr)):
        if stream.undelivered:
            say(f"the program's {name} could not be passed on: {stream.undelivered}")
    if result.outcome == "ok" or (result.outcome == "failed" and result.program_started):
        return
    say(f"{result.outcome}: {result.reason}", bad=f"{result.outcome}:")
