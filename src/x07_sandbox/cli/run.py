"""`x07 run`: run one program and end as it ended."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from x07_sandbox.cli.cancel import cancelled_by_signals
from x07_sandbox.cli.console import LiveLine, say
from x07_sandbox.cli.usage import whole_number
from x07_sandbox.errors import ImageError, UsageError
from x07_sandbox.host import settings
from x07_sandbox.programs.toolchains import describe
from x07_sandbox.runs.lease import PoolMachines
from x07_sandbox.runs.request import RunRequest
from x07_sandbox.runs.run import failure, run

if TYPE_CHECKING:
    from x07_sandbox.runs.result import Result

_EPILOG = f"""languages, by the name of the file:
{describe()}

exit code: the program's own; 128+N for signal N; 124 for a time or CPU limit; 137 out of memory; 153 too much output;
126 the build failed; 125 refused, lost, or its output could not be written; 2 wrong usage. A program may use the same
numbers: scripts read `outcome`.

examples:
  x07 run prog.py
  x07 run --input data.txt prog.c -- --top 10
  x07 run --policy strict.json --json prog.py
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser], *, help: str) -> None:  # noqa: A002
    """Add the verb."""
    parser = verbs.add_parser(
        "run",
        help=help,
        description="Build PROGRAM in one throw-away virtual machine and run it in another.",
        epilog=_EPILOG,
    )
    parser.add_argument("program", metavar="PROGRAM", help="a source file")
    parser.add_argument("args", nargs="*", metavar="ARGS", help="arguments of the program, behind --")
    parser.add_argument(
        "--policy", type=Path, metavar="FILE", help="what it may touch (default: no files, no network, 60 s, 512 MiB)"
    )
    parser.add_argument("--input", type=Path, metavar="FILE", help="its standard input (default: ours)")
    parser.add_argument("--image", metavar="NAME|DIGEST", help="the guest image (default: default)")
    parser.add_argument(
        "--max-output-bytes",
        type=whole_number(0, 1 << 40, "bytes"),
        default=settings.OUTPUT_MAX_BYTES,
        metavar="N",
        help="per stream (default: 64 MiB)",
    )
    parser.add_argument(
        "--queue-timeout",
        type=whole_number(0, int(settings.QUEUE_S), "seconds"),
        default=settings.QUEUE_S,
        metavar="S",
        help="how long to wait while as many machines run as may (default: 600)",
    )
    parser.add_argument("--no-pool", action="store_true", help="take no warm machine, also where x07 pool keeps some")
    parser.add_argument("--no-cache", action="store_true", help="build also what was built before from the same source")
    parser.add_argument("--cold", action="store_true", help="boot the machines anew instead of cloning saved ones")
    parser.add_argument(
        "--json", action="store_true", help="print the result as one JSON object instead of the program's output"
    )
    parser.set_defaults(carry_out=_run)


def _run(options: argparse.Namespace) -> int:
    with contextlib.ExitStack() as stack:
        stdin_fd = _input(options.input, stack)
        _need_image(options.image)
        cancel = stack.enter_context(cancelled_by_signals())
        progress = LiveLine()
        stack.callback(progress, "")
        result = run(
            RunRequest(
                program=Path(options.program),
                args=tuple(options.args),
                policy=options.policy,
                image=options.image,
                stdin_fd=stdin_fd,
                live_stdout=None if options.json else _stream(1),
                live_stderr=None if options.json else _stream(2),
                max_output_bytes=options.max_output_bytes,
                cold=options.cold,
                cache=not options.no_cache,
                queue_s=options.queue_timeout,
                machines=None if options.no_pool else PoolMachines(),
                progress=progress,
                cancel=cancel,
            )
        )
    if options.json:
        return _print(result)
    _explain(result)
    from x07_sandbox.plan.outcomes import REFUSED_EXIT  # loaded by now, while the machine came up

    lost = result.stdout.undelivered or result.stderr.undelivered
    return result.x07_exit_code or (REFUSED_EXIT if lost else 0)


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


def _input(path: Path | None, stack: contextlib.ExitStack) -> int | None:
    if path is None:
        return _stream(0)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise UsageError(
            f"cannot read the input {path}", exc.strerror or str(exc), "Name a readable file with --input"
        ) from exc
    stack.callback(os.close, fd)
    if Path(f"/proc/self/fd/{fd}").is_dir():
        raise UsageError(f"cannot read the input {path}", "it is a folder", "Name a readable file with --input")
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
    with contextlib.suppress(OSError):
        for line in (text or "").splitlines():
            shown = (char if char.isprintable() or char == "\t" else "\N{REPLACEMENT CHARACTER}" for char in line)
            sys.stderr.write("".join(shown) + "\n")
