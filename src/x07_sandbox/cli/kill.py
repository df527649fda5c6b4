"""`x07 kill`: end a running job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from x07_sandbox.cli.console import say
from x07_sandbox.cli.json_output import print_document
from x07_sandbox.cli.parser import add_document_flags, nonempty
from x07_sandbox.housekeeping.kill import KillReport, kill_run
from x07_sandbox.housekeeping.lookup import known_run

if TYPE_CHECKING:
    import argparse

_EPILOG: Final = """Its VM is ended and removed. The command that started the run then exits with code 125, outcome
guest-lost. If that command is dead, its run is swept.

examples:
  x07 ps
  x07 kill 1764273600000-4711-0
  x07 kill --json 1764273600000-4711-0 | jq .jobs_ended

exit code: 0 the run has ended; 125 it could not be ended
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser], *, help: str) -> None:  # noqa: A002
    """Add the verb."""
    parser = verbs.add_parser("kill", help=help, description="End a run, from any process.", epilog=_EPILOG)
    parser.add_argument("run", type=nonempty, metavar="RUN", help="the run's id, or the start of it: see x07 ps")
    add_document_flags(parser, "print one JSON object")
    parser.set_defaults(carry_out=_kill)


def _kill(options: argparse.Namespace) -> int:
    run = known_run(options.run)
    ended = kill_run(run)
    if not print_document(KillReport(run=run, jobs_ended=ended), options):
        say(f"run {run} ended" if ended else f"run {run} had already ended")
    return 0
