"""A verb's JSON document: printed to standard output for --json, and written to the file of --report-out."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Final

from x07_sandbox.cli.console import say, show, write_stdout
from x07_sandbox.errors import RefusedError, SandboxError
from x07_sandbox.host.documents import plain, render_json

if TYPE_CHECKING:
    import msgspec

    from x07_sandbox.programs.project import Status

# The options that name a file, of all verbs except `run`. None of these files may be the file of --report-out.
_FILES: Final = ("files", "policy", "project", "out", "program", "program_flag", "launcher")


def document_wanted(options: argparse.Namespace) -> bool:
    """Whether --json or --report-out was given to a verb that otherwise prints text."""
    return bool(options.json or options.report_out is not None)


def print_document(report: msgspec.Struct, options: argparse.Namespace, *, always: bool = False) -> bool:
    """Deliver one JSON object on several lines. Return whether standard output is reserved for it (see `deliver`)."""
    return deliver(render_json(report), options, always=always)


def print_line(report: msgspec.Struct, options: argparse.Namespace, *, always: bool = False) -> bool:
    """Deliver one JSON object on one line, as X07's command does. The return value is that of `deliver`."""
    line = json.dumps(plain(report), separators=(",", ":")) + "\n"
    return deliver(line.encode(), options, always=always)


def show_written(path: Path, status: Status, following: str) -> None:
    """Print a file's status and the next command to type; nothing if the file has other content and was not changed."""
    words: dict[Status, str] = {"created": "created", "overwritten": "overwrote", "unchanged": "already up to date:"}
    if status in words:
        show(f"{words[status]} {path}")
        show(f"next: {following}")


def shell_path(path: Path) -> str:
    """Return the path relative to the current folder, quoted for a shell."""
    with contextlib.suppress(OSError, ValueError):
        path = path.relative_to(Path.cwd())
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


def print_failure(exc: Exception, options: argparse.Namespace | None = None) -> None:
    """Deliver an error as a document. Without options, print it to standard output. Raises OSError, RefusedError."""
    document = _failure(exc)
    if options is None:
        write_stdout(document)
    else:
        deliver(document, options)


def _failure(exc: Exception) -> bytes:
    from x07_sandbox.reports.commands import failure_report  # only for errors

    return render_json(failure_report(exc))


def deliver(document: bytes, options: argparse.Namespace, *, always: bool = False) -> bool:
    """Write a document to the file of --report-out, and print it for --json unless --quiet-json is given.

    always: whether to print the document even without --json, for a verb that prints nothing else. Return whether
    standard output is reserved for the document, so that the caller prints no text there. Raises OSError, RefusedError.
    """
    if options.report_out is not None:
        from x07_sandbox.cli.outputs import write_bytes

        write_bytes(options.report_out, document)
    reserved: bool = options.json or always
    if reserved and not options.quiet_json:
        write_stdout(document)
    return reserved


def carry_out_with_report(options: argparse.Namespace) -> int:
    """Carry out a verb with --report-out, and write an error to that file, too. Raises the error, or UsageError."""
    from x07_sandbox.cli.outputs import UnwritableError, check_outputs, write_bytes

    others = [getattr(options, name, None) for name in _FILES]
    paths = [Path(one) for value in others for one in (value if isinstance(value, list) else [value]) if one]
    check_outputs({"--report-out": options.report_out}, paths, why="the command line names it for something else")
    try:
        code: int = options.carry_out(options)
    except SandboxError as exc:
        if isinstance(exc, UnwritableError) and exc.path == options.report_out:
            raise
        try:
            write_bytes(options.report_out, _failure(exc))
        except RefusedError as unwritten:  # must not hide the first error
            say(str(unwritten))
        raise
    return code
