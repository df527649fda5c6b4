"""`x07 prune`: remove what nobody needs any more, and say what and how much."""

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

_EPILOG: Final = """what goes, with no switch all of it:
  --images  images that no name leads to, and the packages kept for them; not what X07_VM_GUEST_IMAGE_DIGEST names
  --cache   what was built and has not been used for 7 days, and what killed processes left
  --runs    records of jobs, and folders of runs, that ended more than 7 days ago: with changes to files that were kept
            there, and what undoes them, whenever they were applied
Saved machines go with their image. Nothing goes that a run or a build under way uses, that is somebody else's, damaged
or of a newer format; the latter are named.

examples:
  x07 prune --dry-run
  x07 prune --images
  x07 prune --json | jq .bytes

exit code: 0; 1 if something that should go could not be removed
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser], *, help: str) -> None:  # noqa: A002
    """Add the verb."""
    parser = verbs.add_parser("prune", help=help, description="Remove what nobody needs any more.", epilog=_EPILOG)
    for part in PARTS:
        doc = f"only {part}: see below"
        parser.add_argument(f"--{part}", action="append_const", dest="parts", const=part, help=doc)
    switch(parser, "--dry-run", "remove nothing: say what would go")
    add_document_flags(parser, "one JSON object on standard output")
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
    show(f"{word} {count} thing{'' if count == 1 else 's'}, {size(report.bytes)}")
