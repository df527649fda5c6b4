"""`x07 undo`: bring back what was there before a run's changes were applied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from x07_sandbox.cli.changes_text import add_run, list_deleted, machine_form, summary
from x07_sandbox.cli.console import say
from x07_sandbox.cli.json_output import deliver, wanted
from x07_sandbox.cli.parser import add_document_flags
from x07_sandbox.runs.saved_changes import find_saved, undo_saved

if TYPE_CHECKING:
    import argparse

_EPILOG: Final = """All or nothing: where a name is no more as the run left it, nothing is changed. What is undone can
be applied again. What was left out and applied afterwards is undone first, alone.

examples:
  x07 undo
  x07 undo 1764064

exit code: 0 done; 125 a conflict; 2 no such run, or nothing of it is applied
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser], *, help: str) -> None:  # noqa: A002
    """Add the verb."""
    parser = verbs.add_parser("undo", help=help, description="Take a run's changes back.", epilog=_EPILOG)
    add_run(parser)
    add_document_flags(parser, "what was done, as one JSON object; errors too")
    parser.set_defaults(carry_out=_undo)


def _undo(options: argparse.Namespace) -> int:
    kept = find_saved(options.run)
    changes = undo_saved(kept, lambda path: say(f"waiting: another command changes {path}"))
    if wanted(options) and deliver(machine_form(changes), options):
        return 0
    list_deleted(changes, back=True)
    then = "x07 undo takes back what was applied before" if kept.undos else "x07 apply"
    say(summary(changes, f"undone; {then}"))
    return 0
