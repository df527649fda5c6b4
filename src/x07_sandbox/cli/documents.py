"""The one JSON document of a verb: on standard output, as --json promises, and in the file of --report-out."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from x07_sandbox.errors import SandboxError
from x07_sandbox.reports.failure import failure_report

if TYPE_CHECKING:
    import argparse

# The options of our verbs that name files, `run`'s aside.
_FILES: Final = ("file", "files", "first", "second", "policy", "project", "out")


def wanted(options: argparse.Namespace) -> bool:
    """Whether anybody asked for the document of a verb that prints text otherwise."""
    return bool(options.json or options.report_out is not None)


def print_document(report: msgspec.Struct, options: argparse.Namespace) -> bool:
    """One JSON object, over several lines, in ASCII: a path need not be UTF-8. As deliver has it."""
    return deliver(_rendered(report), options)


def print_line(report: msgspec.Struct, options: argparse.Namespace) -> None:
    """One JSON object on one line, as X07's command prints them, whether or not --json is given. As deliver has it."""
    line = json.dumps(msgspec.to_builtins(report), ensure_ascii=False, separators=(",", ":")) + "\n"
    deliver(line.encode("utf-8", "replace"), options, always=True)


def print_failure(exc: Exception, options: argparse.Namespace | None = None) -> None:
    """An error, as a document; options: None for standard output alone. Raises OSError, RefusedError."""
    document = _rendered(failure_report(exc))
    if options is None:
        _print(document)
    else:
        deliver(document, options)


def deliver(document: bytes, options: argparse.Namespace, *, always: bool = False) -> bool:
    """Write a verb's document to the file of --report-out, and print it if it is asked for and not kept quiet.

    always: the verb prints nothing else, so --json need not ask for it. Returns whether standard output is the
    document's, so that no text may go there. Raises OSError, RefusedError.
    """
    if options.report_out is not None:
        _write(document, options)
    ours: bool = options.json or always
    if ours and not options.quiet_json:
        _print(document)
    return ours


def carry_out_with_report(options: argparse.Namespace) -> int:
    """Carry a verb out whose document goes to a file, where an error that ends it is told too; its exit code.

    Raises UsageError before anything is done if the file cannot be written, or if the command line names it for
    something else, and what the verb raises.
    """
    from x07_sandbox.cli.written import check_outputs

    others = [getattr(options, name, None) for name in _FILES]
    paths = [Path(one) for value in others for one in (value if isinstance(value, list) else [value]) if one]
    check_outputs({"--report-out": options.report_out}, paths, why="the command line names it for something else")
    try:
        code: int = options.carry_out(options)
    except SandboxError as exc:
        _write(_rendered(failure_report(exc)), options)
        raise
    return code


def _rendered(report: msgspec.Struct) -> bytes:
    return (json.dumps(msgspec.to_builtins(report), indent=2) + "\n").encode()


def _print(document: bytes) -> None:
    sys.stdout.flush()
    sys.stdout.buffer.write(document)
    sys.stdout.buffer.flush()


def _write(document: bytes, options: argparse.Namespace) -> None:
    from x07_sandbox.cli.written import write_all, write_whole

    write_whole(options.report_out, partial(write_all, data=document))
