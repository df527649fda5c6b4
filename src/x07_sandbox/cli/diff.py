"""`x07 diff`: show what a run changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from x07_sandbox.cli.changes_text import add_run, changes_json, include_applied, patch_chunks, print_bytes
from x07_sandbox.cli.json_output import deliver, document_wanted
from x07_sandbox.cli.parser import add_document_flags
from x07_sandbox.runs.saved_changes import find

if TYPE_CHECKING:
    import argparse

_EPILOG: Final = """Prints a patch in git's format, deletions first.
Changes that are not allowed are marked, with the reason.

examples:
  x07 diff | less
  x07 diff --json | jq '.roots[].changes[] | .name'
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser], *, help: str) -> None:  # noqa: A002
    """Add the verb."""
    parser = verbs.add_parser("diff", help=help, description="Show what a run changed.", epilog=_EPILOG)
    add_run(parser)
    add_document_flags(parser, "print all changes with digests as one JSON object")
    parser.set_defaults(carry_out=_diff)


def _diff(options: argparse.Namespace) -> int:
    kept = include_applied(find(options.run))
    if document_wanted(options) and deliver(changes_json(kept.changes), options):
        return 0
    for chunk in patch_chunks(kept):
        print_bytes(chunk)
    return 0
