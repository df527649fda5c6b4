"""`x07 logs`: what a run has left to read about its connections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from x07_sandbox.cli.changed import print_bytes
from x07_sandbox.cli.console import say
from x07_sandbox.cli.usage import named
from x07_sandbox.runs.folder import NET_LOG, find_run

if TYPE_CHECKING:
    import argparse

_EPILOG: Final = """One JSON object a line: event (open, closed, denied, failed), host, port, rule, ms since the start.

examples:
  x07 logs --net | jq -c 'select(.event == "denied")'
"""
_CHUNK: Final = 1 << 16


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser], *, help: str) -> None:  # noqa: A002
    """Add the verb."""
    parser = verbs.add_parser("logs", help=help, description="Print the log of a run.", epilog=_EPILOG)
    parser.add_argument(
        "run",
        nargs="?",
        type=named,
        metavar="RUN",
        help="its name, or the beginning of it (default: the latest that could connect)",
    )
    parser.add_argument("--net", action="store_true", required=True, help="each connection that the program asked for")
    parser.set_defaults(carry_out=_logs)


def _logs(options: argparse.Namespace) -> int:
    folder = find_run(options.run, NET_LOG, "a log of connections", "Run something with --allow-host")
    say(f"connections of run {folder.name}")
    with (folder / NET_LOG).open("rb") as file:
        while chunk := file.read(_CHUNK):
            print_bytes(chunk)
    return 0
