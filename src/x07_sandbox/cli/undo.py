"""`x07 undo`: revert a run's applied changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from x07_sandbox.cli.changes_text import add_run, changes_json, say_deleted, summary
from x07_sandbox.cli.console import say
from x07_sandbox.cli.json_output import deliver, document_wanted
from x07_sandbox.cli.parser import add_document_flags
from x07_sandbox.runs.saved_changes import find, undo

if TYPE_CHECKING:
    import argparse

_EPILOG: Final = """Reverts everything or nothing: if a file has changed since, nothing is changed.
Reverted changes can be
applied again. Changes that were applied in a second step are reverted first, alone.

examples:
  x07 undo
  x07 undo 1764064

exit code: 0 reverted; 125 a conflict; 2 no such run, or none of its changes is applied
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser], *, help: str) -> None:  # noqa: A002
    """Add the verb."""
    parser = verbs.add_parser("undo", help=help, description="Revert a run's applied changes.", epilog=_EPILOG)
    add_run(parser)
    add_document_flags(parser, "print what was done, or the error, as one JSON object")
    parser.set_defaults(carry_out=_undo)


def _undo(options: argparse.Namespace) -> int:
    kept = find(options.run)
    changes = undo(kept, lambda path: say(f"waiting: another command is changing {path}"))
    if document_wanted(options) and deliver(changes_json(changes), options):
        return 0
    say_deleted(changes, back=True)
    then = "x07 undo reverts what was applied before" if kept.undos else "x07 apply"
    say(summary(changes, f"reverted; {then}"))
    return 0
