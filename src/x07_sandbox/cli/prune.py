"""`x07 prune`: remove images, caches and records that are no longer needed."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from x07_sandbox.cli.console import say, show, size
from x07_sandbox.cli.json_output import print_document
from x07_sandbox.cli.parser import add_document_flags, switch
from x07_sandbox.housekeeping.prune import prune
from x07_sandbox.housekeeping.pruner import PARTS

if TYPE_CHECKING:
    from x07_sandbox.housekeeping.pruner import PruneReport

_EPILOG: Final = """what is removed (without a switch, all of it):
  --images  images without a name, with their packages and templates; not the one in X07_VM_GUEST_IMAGE_DIGEST
  --cache   built programs that were not used for 7 days, and leftovers of killed processes
  --runs    records of jobs and folders of runs that ended more than 7 days ago, with their saved changes and undo data
Nothing is removed that a run or build in progress uses, or that belongs to another user; damaged and newer items are
listed.

examples:
  x07 prune --dry-run
  x07 prune --images
  x07 prune --json | jq .bytes

exit code: 0 done; 1 something could not be removed
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser], *, help: str) -> None:  # noqa: A002
    """Add the verb."""
    parser = verbs.add_parser(
        "prune", help=help, description="Remove images, caches and records that are no longer needed.", epilog=_EPILOG
    )
    for part in PARTS:
        doc = f"remove only {part}: see below"
        parser.add_argument(f"--{part}", action="append_const", dest="parts", const=part, help=doc)
    switch(parser, "--dry-run", "show what would be removed, without removing it")
    add_document_flags(parser, "print one JSON object")
    parser.set_defaults(carry_out=_prune)


def _prune(options: argparse.Namespace) -> int:
    report = prune(options.parts or PARTS, progress=say, dry_run=options.dry_run)
    if not print_document(report, options):
        _show(report)
    return 1 if any(kept.failed for kept in report.kept) else 0


def _show(report: PruneReport) -> None:
    word = "would remove" if report.dry_run else "removed"
    for gone in report.removed:
        show(f"{word} {gone.kind} {gone.path} ({size(gone.bytes)}): {gone.why}")
    for kept in report.kept:
        show(f"kept {kept.kind} {kept.path}: {kept.why}")
    count = len(report.removed)
    show(f"{word} {count} item{'' if count == 1 else 's'}, {size(report.bytes)}")
