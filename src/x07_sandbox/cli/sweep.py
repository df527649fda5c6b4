"""`x07 sweep`: remove what dead runners left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from x07_sandbox.cli.console import say, show
from x07_sandbox.cli.json_output import print_document
from x07_sandbox.cli.parser import add_document_flags, switch
from x07_sandbox.housekeeping.sweep import sweep

if TYPE_CHECKING:
    import argparse

_EPILOG: Final = """what goes:
  jobs whose runner is dead, or whose deadline and clean-up time have passed: their processes, containers, control
  groups and files; changes to files that were applied by halves; records and folders of runs that ended more than 7
  days ago; saved machines that no image needs
Nothing that a live runner still uses is touched, nor what is another user's, another machine's, damaged or of a newer
format; the latter are named. Every run sweeps the first of these before it starts.

examples:
  x07 sweep --dry-run
  x07 sweep
  x07 sweep --json | jq '.kept[] | .why'

exit code: 0; 1 if the job of a dead runner could not be ended
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser], *, help: str) -> None:  # noqa: A002
    """Add the verb."""
    parser = verbs.add_parser("sweep", help=help, description="Remove what dead runners left.", epilog=_EPILOG)
    switch(parser, "--dry-run", "remove nothing: say what would go")
    add_document_flags(parser, "one JSON object on standard output")
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
        show(f"{word} {count} thing{'' if count == 1 else 's'}")
    return 1 if any(kept.failed for kept in report.kept) else 0
