"""Carries out one long run in a separate process, so that a check can stop the run by its record or kill the process.

Arguments: BACKEND CODE [ARGUMENTS]. It prints the program's output, then a line with the outcome and the reason.
"""

from __future__ import annotations

import contextlib
import sys

from x07_sandbox.conformance.harness import request
from x07_sandbox.errors import printable
from x07_sandbox.host.cancel import Cancel
from x07_sandbox.runs.run import run


def main(words: list[str]) -> None:
    """Run the program that *words* describe, and print how the run ended."""
    with contextlib.closing(Cancel()) as cancel:
        result = run(request(*words, live_stdout=1, cancel=cancel))
    sys.stdout.write(f"{result.outcome}: {printable(result.reason)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
