"""The command `x07-os-runner`: upstream's runner interface, which this version does not have yet."""

from __future__ import annotations

from x07_sandbox.cli.console import say


def main() -> int:
    """Say so, on standard error, with nothing on standard output (exit 2)."""
    say("x07-os-runner comes with the full command line; this version has `x07 run`")
    return 2
