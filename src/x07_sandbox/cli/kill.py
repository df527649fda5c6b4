"""`x07 kill`: end a run that is under way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from x07_sandbox.cli.console import say
from x07_sandbox.cli.usage import named
from x07_sandbox.housekeeping.kill import kill_run
from x07_sandbox.housekeeping.lookup import known_run

if TYPE_CHECKING:
    import argparse

_EPILOG: Final = """Its machine is ended and removed. The command that started the run then ends by itself, with the
outcome guest-lost and exit code 125. The run of a command that is dead already is swept.

examples:
  x07 ps
  x07 kill 1764273600000-4711-0

exit code: 0 if the run is over; 125 if it goes on
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser], *, help: str) -> None:  # noqa: A002
    """Add the verb."""
    parser = verbs.add_parser("kill", help=help, description="End a run, from any process.", epilog=_EPILOG)
    parser.add_argument("run", type=named, metavar="RUN", help="its name, or the beginning of it: see x07 ps")
    parser.set_defaults(carry_out=_kill)


def _kill(options: argparse.Namespace) -> int:
    run = known_run(options.run)
    ended = kill_run(run)
    say(f"run {run} is over" if ended else f"run {run} was over already")
    return 0
