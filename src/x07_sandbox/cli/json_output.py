"""The one JSON document of a verb: on standard output, as --json promises, and in the file of --report-out."""

from __future__ import annotations

import contextlib
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Final

from x07_sandbox.cli.console import say, show, write_stdout
from x07_sandbox.cli.parser import actions, parser_for
from x07_sandbox.errors import Cancelled, RefusedError, SandboxError
from x07_sandbox.host.os_errors import host_error
from x07_sandbox.reports.document import failure_report, plain, render_json

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Sequence

    import msgspec

    from x07_sandbox.host.documents import Status

# What documents that tell of a command begin their version with; those that a command reads are called otherwise.
_DOCUMENTS: Final = ("x07.sandbox.", "x07-os-runner.report@", "x07.run.report@", "x07.policy.init.report@")
_DOCUMENT_MAX: Final = 1 << 28
# The options of our verbs that name files which they read, `run`'s aside. What a verb writes it says itself (`writes`).
_FILES: Final = ("file", "files", "first", "second", "policy", "project")


def document_wanted(options: argparse.Namespace) -> bool:
    """Whether anybody asked for the document of a verb that prints text otherwise."""
    return bool(options.json or options.report_out is not None)


def print_document(report: msgspec.Struct, options: argparse.Namespace) -> bool:
    """One JSON object, over several lines. As deliver has it."""
    return deliver(render_json(report), options)


def print_object(report: msgspec.Struct, options: argparse.Namespace) -> None:
    """One JSON object over several lines, whether or not --json is given. As deliver has it."""
    deliver(render_json(report), options, always=True)


def print_line(report: msgspec.Struct, options: argparse.Namespace, *, always: bool = False) -> bool:
    """One JSON object on one line, as X07's command prints them. As deliver has it."""
    line = json.dumps(plain(report), ensure_ascii=False, separators=(",", ":")) + "\n"
    return deliver(line.encode(), options, always=always)


def show_written(path: Path, status: Status, following: str) -> None:
    """Tell people that a file was written, and the command that comes next; one that was left alone is an error."""
    words: dict[Status, str] = {"created": "created", "overwritten": "overwrote", "unchanged": "already up to date:"}
    if status in words:
        show(f"{words[status]} {path}")
        show(f"next: {following}")


def shell_path(path: Path) -> str:
    """The path as it is typed in this folder, quoted for a shell."""
    with contextlib.suppress(OSError, ValueError):
        path = path.relative_to(Path.cwd())
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


def print_failure(exc: Exception, options: argparse.Namespace | None = None) -> None:
    """An error, as a document; options: None for standard output alone. Raises OSError, RefusedError."""
    document = failure_document(exc)
    if options is None:
        write_stdout(document)
    else:
        deliver(document, options)


def failure_document(exc: Exception) -> bytes:
    """An error as the document of every verb but `run`."""
    return render_json(failure_report(exc))


def deliver(document: bytes, options: argparse.Namespace, *, always: bool = False) -> bool:
    """Write a verb's document to the file of --report-out, and print it if it is asked for and not kept quiet.

    always: the verb prints nothing else, so --json need not ask for it. Returns whether standard output is the
    document's, so that no text may go there. Raises OSError, RefusedError.
    """
    if options.report_out is not None:
        from x07_sandbox.cli.atomic_output import write_bytes

        write_bytes(options.report_out, document)
    ours: bool = options.json or always
    if ours and not options.quiet_json:
        write_stdout(document)
    return ours


def write_early_failure(document: bytes, path: Path, others: Iterable[object]) -> None:
    """Write an error to the file of --report-out before it is known what else the command needs.

    A file that the command line names elsewhere (*others*), or that holds anything but an earlier document, is left
    alone. No error is raised where the file cannot be written: the document already tells of one.
    """
    from x07_sandbox.cli.atomic_output import check_outputs, write_bytes

    named = [Path(one) for one in others if isinstance(one, str | Path)]
    with contextlib.suppress(OSError, SandboxError, ValueError, RecursionError):
        check_outputs({"--report-out": path}, named)
        if not path.exists() or _is_document(path):
            write_bytes(path, document)


def _is_document(path: Path) -> bool:
    """Whether it holds one that a command of ours prints, or nothing. Raises OSError, ValueError, RecursionError."""
    with path.open("rb") as file:
        head = file.read(1)
        if head != b"{" or path.stat().st_size > _DOCUMENT_MAX:  # most of what is no document is not read whole
            return not head
        found = json.loads(head + file.read(_DOCUMENT_MAX))
    return isinstance(found, dict) and str(found.get("schema_version")).startswith(_DOCUMENTS)


def report_file(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """What --report-out names in words that could not be parsed, if the verb has that flag, and the other words."""
    known = any("--report-out" in action.option_strings for action in actions(parser_for([*words])))
    path, left = None, iter(words if known else ())
    others: list[str] = []
    for word in left:
        flag, equals, value = word.partition("=")
        if word == "--":
            others += left
        elif flag == "--report-out":
            path = value if equals else next(left, None)
        else:
            others += [word, value] if equals else [word]
    return Path(path) if path else None, others


def carry_out_with_report(options: argparse.Namespace) -> int:
    """Carry out a verb that has --report-out, and write an error that ends it to that file too; its exit code.

    Raises what the verb raises, and UsageError before anything is done if the file cannot be written, if the command
    line names it for something else, or if the verb or its project needs it (`options.writes` gives such paths).
    """
    from x07_sandbox.cli.atomic_output import check_outputs, write_bytes

    others = [getattr(options, name, None) for name in _FILES]
    paths = [Path(one) for value in others for one in (value if isinstance(value, list) else [value]) if one]
    outputs = {"--report-out": options.report_out}
    check_outputs(outputs, paths, why="the command line names it for something else")
    if hasattr(options, "writes"):
        check_outputs(outputs, options.writes(options), why="the project or the command itself needs it")
    try:
        code: int = options.carry_out(options)
    except (SandboxError, KeyboardInterrupt, OSError) as exc:
        if (error := _as_error(exc)) is not None:
            try:
                write_bytes(options.report_out, failure_document(error))
            except RefusedError as write_errors:  # the error itself is what has to be told
                say(str(write_errors))
        raise
    return code


def _as_error(exc: BaseException) -> Exception | None:
    """What ended a verb, as it is told; None where it was standard output, and the file has its document already."""
    if isinstance(exc, KeyboardInterrupt):
        return Cancelled("the command was cancelled", "a signal came", "Start it again")
    if isinstance(exc, OSError):
        return None if exc.filename is None else host_error(exc)
    return exc if isinstance(exc, Exception) else None
