"""`x07 df`: show disk usage of images, caches and records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from x07_sandbox.cli.console import say, show, size
from x07_sandbox.cli.json_output import print_document
from x07_sandbox.cli.parser import add_document_flags
from x07_sandbox.housekeeping.usage import disk_usage

if TYPE_CHECKING:
    import argparse

_EPILOG: Final = """parts:
  images     guest images and their packages
  templates  saved VMs, from which runs are cloned
  cache      built programs, and records of what was verified
  runs       output, results and changes of runs
  records    records of jobs

examples:
  x07 df
  x07 df --json | jq .prunable_bytes
  x07 prune                             free what the last column counts
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser], *, help: str) -> None:  # noqa: A002
    """Add the verb."""
    doc = "Show disk usage of images, caches and records, and what x07 prune would free."
    parser = verbs.add_parser("df", help=help, description=doc, epilog=_EPILOG)
    add_document_flags(parser, "print one JSON object")
    parser.set_defaults(carry_out=_df)


def _df(options: argparse.Namespace) -> int:
    report = disk_usage(say)
    if print_document(report, options):
        return 0
    show(f"{'PART':<10} {'FILES':>7} {'SIZE':>11} {'PRUNABLE':>11}  FOLDER")
    for part in report.parts:
        show(f"{part.name:<10} {part.files:>7} {size(part.bytes):>11} {size(part.prunable_bytes):>11}  {part.path}")
    files = sum(part.files for part in report.parts)
    show(f"{'all':<10} {files:>7} {size(report.bytes):>11} {size(report.prunable_bytes):>11}")
    return 0
