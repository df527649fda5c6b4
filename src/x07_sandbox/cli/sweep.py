"""`x07 sweep`: remove what dead runners left behind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from x07_sandbox.cli.console import say, show
from x07_sandbox.cli.json_output import print_document
from x07_sandbox.cli.parser import add_document_flags, switch
from x07_sandbox.housekeeping.sweep import sweep

if TYPE_CHECKING:
    import argparse

_EPILOG: Final = """what is removed:
  jobs whose runner is dead, or whose deadline and clean-up time have passed: processes, containers, control groups
  and files
  records and folders of runs that ended more than 7 days ago; templates that no image needs
Changes that were only partly applied are finished or rolled back. Nothing is removed that a live runner uses, or that
belongs to another user or machine; damaged and newer records are listed. Every run sweeps dead jobs before it starts.

examples:
  x07 sweep --dry-run
  x07 sweep
  x07 sweep --json | jq '.kept[] | .why'

exit code: 0 done; 1 the job of a dead runner could not be ended
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser], *, help: str) -> None:  # noqa: A002
    """Add the verb."""
    parser = verbs.add_parser("sweep", help=help, description="Remove what dead runners left behind.", epilog=_EPILOG)
    switch(parser, "--dry-run", "show what would be removed, without removing it")
    add_document_flags(parser, "print one JSON object")
    parser.set_defaults(carry_out=_sweep)


def _sweep(options: argparse.Namespace) -> int:
    report = sweep(dry_run=options.dry_run, progress=say)
    if not print_document(report, options):
        word = "would remove" if report.dry_run else "removed"
        for gone in report.removed:
            show(f"{word} {gone.kind} {gone.id}: {gone.why}")
        for kept in report.kept:
            show(f"kept {kept.kind} {kept.id}: {kept.why}")
        count = len(report.removed)
        show(f"{word} {count} item{'' if count == 1 else 's'}")
    return 1 if any(kept.failed for kept in report.kept) else 0
