"""`x07 run`: run one program and end as it ended."""

from __future__ import annotations

import argparse
import binascii
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from x07_sandbox.cli.cancel import cancelled_by_signals
from x07_sandbox.cli.console import LiveLine, plain, say
from x07_sandbox.cli.usage import whole_number
from x07_sandbox.errors import ImageError, UsageError
from x07_sandbox.host import settings
from x07_sandbox.programs.toolchains import BY_NAME, describe
from x07_sandbox.runs.lease import PoolMachines
from x07_sandbox.runs.request import RunRequest
from x07_sandbox.runs.run import failure, run
from x07_sandbox.runs.streams import memory_file

if TYPE_CHECKING:
    from x07_sandbox.policy.overrides import Overrides
    from x07_sandbox.runs.result import Result
    from x07_sandbox.runs.streams import Cancel

_EPILOG = f"""languages, by the name of the file or by --toolchain:
{describe()}
A folder with an x07-sandbox.toml is a project of more files: docs/programs.md.

exit code: the program's own; 128+N for signal N; 124 for a time or CPU limit; 137 out of memory; 153 too much output;
126 the build failed; 125 refused, lost, or its output could not be written; 2 wrong usage. A program may use the same
numbers: scripts read `outcome`.

examples:
  x07 run prog.py
  x07 run --input data.txt prog.c -- --top 10
  x07 run -c 'print(6 * 7)' --toolchain python
  generate | x07 run --toolchain shell -           the source comes from standard input
  x07 run --policy strict.json --json prog.py
  x07 run --env LEVEL=3 ./a.out
  x07 run --dry-run project/                       what would be done, and what the policy would hold
"""
_OVERRIDES = (
    ("--allow-host", "HOST:PORT[,PORT...]", "a host that it may connect to"),
    ("--allow-host-file", "FILE", "a file of such, one a line"),
    ("--deny-host", "HOST:PORT[,...]|HOST:*", "one that it may not, whatever allows it"),
    ("--deny-host-file", "FILE", "a file of such"),
    ("--allow-read-root", "PATH", "a folder that it may read"),
    ("--allow-write-root", "PATH", "one that it may change"),
)
_SOURCE_MAX = settings.SOURCE_MAX_BYTES


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser], *, help: str) -> None:  # noqa: A002
    """Add the verb."""
    parser = verbs.add_parser(
        "run",
        help=help,
        description="Build PROGRAM in one throw-away virtual machine and run it in another.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "program", metavar="PROGRAM", nargs="?", help="a source file, an executable, a project's folder; - for stdin"
    )
    parser.add_argument("args", nargs="*", metavar="ARGS", help="arguments of the program, behind --")
    _add_program(parser)
    _add_overrides(parser)
    _add_input(parser)
    _add_machine(parser)
    _add_output(parser)
    parser.set_defaults(carry_out=_run)


def _add_program(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the program")
    group.add_argument("-c", dest="code", metavar="CODE", help="a source text; needs --toolchain")
    group.add_argument("--toolchain", choices=tuple(BY_NAME), metavar="T", help="how it is built and started")
    group.add_argument(
        "--policy",
        metavar="FILE",
        help="what it may touch: a document, or built-in:TEMPLATE (default: no files, no network, 60 s, 512 MiB)",
    )
    group.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="a variable of the program; NAME alone: ours"
    )


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("changes to the policy, each any number of times")
    for flag, form, text in _OVERRIDES:
        group.add_argument(flag, action="append", default=[], metavar=form, help=text)


def _add_input(parser: argparse.ArgumentParser) -> None:
    title = "its standard input (default: the project's, else ours)"
    group = parser.add_argument_group(title).add_mutually_exclusive_group()
    group.add_argument("--input", type=Path, metavar="FILE", help="a file")
    group.add_argument("--stdin", action="store_true", help="ours, whatever the project says")
    group.add_argument("--input-b64", metavar="TEXT", help="bytes, as base64")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the machines")
    group.add_argument("--image", metavar="NAME|DIGEST", help="the guest image (default: default)")
    group.add_argument("--require-hardware", action="store_true", help="refuse emulation")
    group.add_argument(
        "--queue-timeout",
        type=whole_number(0, int(settings.QUEUE_S), "seconds"),
        default=settings.QUEUE_S,
        metavar="S",
        help="how long to wait while as many machines run as may (default: 600)",
    )
    group.add_argument("--no-pool", action="store_true", help="take no warm machine, also where x07 pool keeps some")
    group.add_argument("--no-cache", action="store_true", help="build also what was built before from the same source")
    group.add_argument("--cold", action="store_true", help="boot the machines anew instead of cloning saved ones")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--json", action="store_true", help="print the result as one JSON object instead of the program's output"
    )
    group.add_argument("--report-out", type=Path, metavar="FILE", help="write the result there too, as JSON")
    group.add_argument("--quiet-json", action="store_true", help="with --report-out: print no JSON")
    group.add_argument("--raw", action="store_true", help="let a terminal have control sequences of the program's")
    group.add_argument(
        "--max-output-bytes",
        type=whole_number(0, 1 << 40, "bytes"),
        default=settings.OUTPUT_MAX_BYTES,
        metavar="N",
        help="per stream (default: 64 MiB)",
    )
    group.add_argument("--compiled-out", type=Path, metavar="FILE", help="keep what was built there")
    group.add_argument("--dry-run", action="store_true", help="boot nothing: say what would be done")


def _run(options: argparse.Namespace) -> int:
    with contextlib.ExitStack() as stack:
        if not options.dry_run:
            _need_image(options.image)
        cancel = stack.enter_context(cancelled_by_signals())
        progress = LiveLine()
        stack.callback(progress, "")
        request = _request(options, stack, cancel, progress)
        if options.dry_run:
            from x07_sandbox.cli.dry_run import show_plan

            return show_plan(request, as_json=options.json)
        if options.compiled_out is not None:
            from x07_sandbox.cli.written import compiled_out

            request = stack.enter_context(compiled_out(options.compiled_out, request))
        result = run(request)
    if options.report_out is not None:
        from x07_sandbox.cli.written import write_report

        write_report(options.report_out, result)
    if options.json:
        return result.x07_exit_code if options.quiet_json else _print(result)
    _explain(result)
    from x07_sandbox.plan.outcomes import REFUSED_EXIT  # loaded by now, while the machine came up

    lost = result.stdout.undelivered or result.stderr.undelivered
    return result.x07_exit_code or (REFUSED_EXIT if lost else 0)


def _request(
    options: argparse.Namespace, stack: contextlib.ExitStack, cancel: Cancel, progress: LiveLine
) -> RunRequest:
    """What the command line asks for. Raises UsageError."""
    words = list(options.args)
    program: str | None = options.program
    source: bytes | None = None
    if options.code is not None:
        words = [*([program] if program is not None else []), *words]
        program, source = None, options.code.encode("utf-8", "surrogateescape")
    elif program == "-":
        with cancel.waiting():
            program, source = None, _source_from_stdin()
    elif program is None:
        raise UsageError("cannot run nothing", "no PROGRAM is named", "Name one, or give a source with -c")
    stdin_fd = None if options.code is None and source is not None else _stream(0)
    if options.input_b64 is not None:
        stdin_fd = memory_file(_decoded(options.input_b64), stack)
    return RunRequest(
        program=None if program is None else Path(program),
        source=source,
        toolchain=options.toolchain,
        args=tuple(words),
        policy=options.policy,
        overrides=_overrides(options),
        env=dict(map(_variable, options.env)),
        image=options.image,
        input=options.input,
        stdin_fd=stdin_fd,
        stdin_default=not (options.stdin or options.input_b64 is not None),
        live_stdout=None if options.json else _stream(1),
        live_stderr=None if options.json else _stream(2),
        raw=options.raw,
        max_output_bytes=options.max_output_bytes,
        cold=options.cold,
        cache=not options.no_cache,
        queue_s=options.queue_timeout,
        machines=None if options.no_pool else PoolMachines(),
        require_hardware=options.require_hardware,
        progress=progress,
        cancel=cancel,
    )


def _overrides(options: argparse.Namespace) -> Overrides | None:
    keys = [flag[2:].replace("-", "_") for flag, _, _ in _OVERRIDES]
    given = {key: tuple(getattr(options, key)) for key in keys}
    if not any(given.values()):
        return None
    from x07_sandbox.policy.overrides import Overrides

    return Overrides(**given)


def _source_from_stdin() -> bytes:
    """The source that PROGRAM `-` stands for. Raises UsageError."""
    try:
        source = sys.stdin.buffer.read(_SOURCE_MAX + 1)
    except OSError as exc:
        raise UsageError("cannot read the source", exc.strerror or str(exc), "Pipe it to standard input") from exc
    if not source:
        raise UsageError("cannot run the source", "standard input is empty", "Pipe it to standard input")
    return source


def _decoded(text: str) -> bytes:
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


def print_failure(exc: Exception, signalled: int | None = None) -> int:
    """A failure from before there was a result, as the one JSON object that --json promises; the exit code."""
    return _print(failure(exc, signalled))


def _print(result: Result) -> int:
    from x07_sandbox.reports.document import render_json

    sys.stdout.buffer.write(render_json(result))
    sys.stdout.buffer.flush()
    return result.x07_exit_code


def _stream(fd: int) -> int | None:
    try:
        os.fstat(fd)
    except OSError:
        return None  # closed by whoever started us
    return fd


def _need_image(ref: str | None) -> None:
    """On a terminal, make the default image when there is none, or renew it; elsewhere leave the refusal to the run."""
    from x07_sandbox.images.store import find_image, image_is_current

    if ref is not None or not sys.stderr.isatty():
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
    if result.outcome == "build-failed":
        _show(result.stdout.text)
        _show(result.stderr.text)
    for warning in result.warnings:
        if warning.startswith("the input"):
            say(warning)
    for name, stream in (("standard output", result.stdout), ("standard error", result.stderr)):
        if stream.undelivered:
            say(f"the program's {name} could not be passed on: {stream.undelivered}")
    if result.outcome in {"ok", "failed"}:
        return
    say(f"{result.outcome}: {result.reason}")


def _show(text: str | None) -> None:
    """Text from a guest, with control characters filtered."""
    if text:
        with contextlib.suppress(OSError):
            sys.stderr.write(plain(text).removesuffix("\n") + "\n")
