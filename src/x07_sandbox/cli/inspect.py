"""`x07 inspect`: print everything about one run as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from x07_sandbox.cli.json_output import print_document
from x07_sandbox.cli.parser import add_document_flags, nonempty
from x07_sandbox.housekeeping.listing import inspect_run
from x07_sandbox.housekeeping.lookup import known_run

if TYPE_CHECKING:
    import argparse

_EPILOG: Final = """The object has the run's jobs (record, labels, owner, state), its result, and the file paths.

examples:
  x07 inspect 1764273600000
  x07 inspect 1764273600000-4711-0 | jq .result.outcome
  x07 inspect 1764273600000-4711-0 | jq -r .paths.folder
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser], *, help: str) -> None:  # noqa: A002
    """Add the verb."""
    doc = "Print everything about one run as one JSON object."
    parser = verbs.add_parser("inspect", help=help, description=doc, epilog=_EPILOG)
    parser.add_argument("run", type=nonempty, metavar="RUN", help="the run's id, or the start of it")
    add_document_flags(parser, "accepted for symmetry: the output is always JSON")
    parser.set_defaults(carry_out=_inspect)


def _inspect(options: argparse.Namespace) -> int:
    print_document(inspect_run(known_run(options.run)), options, always=True)
    return 0
