"""Reports on standard output, as the JSON that --json promises."""

from __future__ import annotations

import json
import sys

import msgspec

from x07_sandbox.reports.failure import failure_report


def print_document(report: msgspec.Struct) -> None:
    """One JSON object, over several lines, in ASCII: a path need not be UTF-8. Raises OSError."""
    sys.stdout.write(json.dumps(msgspec.to_builtins(report), indent=2) + "\n")
    sys.stdout.flush()


def print_line(report: msgspec.Struct) -> None:
    """One JSON object on one line, as X07's command prints them. Raises OSError."""
    line = json.dumps(msgspec.to_builtins(report), ensure_ascii=False, separators=(",", ":")) + "\n"
    sys.stdout.buffer.write(line.encode("utf-8", "replace"))
    sys.stdout.buffer.flush()


def print_failure(exc: Exception) -> None:
    """An error, as a document. Raises OSError."""
    print_document(failure_report(exc))
