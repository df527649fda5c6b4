"""`x07 diff`: what a run has changed, to read before or after it is applied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from x07_sandbox.cli.changes_text import add_run, as_applied, machine_form, pieces, print_bytes
from x07_sandbox.cli.json_output import deliver, wanted
from x07_sandbox.cli.parser import add_document_flags
from x07_sandbox.runs.saved_changes import find_saved

if TYPE_CHECKING:
    import argparse

_EPILOG: Final = """A patch in git's form: deletions first. What a policy does not let be done is marked, and says why.

examples:
  x07 diff | less
  x07 diff --json | jq '.roots[].changes[] | .name'
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser], *, help: str) -> None:  # noqa: A002
    """Add the verb."""
    parser = verbs.add_parser("diff", help=help, description="Show what a run has changed.", epilog=_EPILOG)
    add_run(parser)
    add_document_flags(parser, "all of it with digests, as one JSON object")
    parser.set_defaults(carry_out=_diff)


def _diff(options: argparse.Namespace) -> int:
    kept = as_applied(find_saved(options.run))
    if wanted(options) and deliver(machine_form(kept.changes), options):
        return 0
    for piece in pieces(kept):
        print_bytes(piece)
    return 0
