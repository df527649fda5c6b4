"""Carries out one long run in its own process, so that a check can stop it by its record or kill this process.

Arguments: BACKEND CODE [ARGUMENTS]. The program's output comes first; the last line is the outcome and the reason.
"""

from __future__ import annotations

import contextlib
import sys

from x07_sandbox.conformance.harness import request
from x07_sandbox.errors import printable
from x07_sandbox.host.cancel import Cancel
from x07_sandbox.runs.run import run


def main(words: list[str]) -> None:
    """Carry out the run and print how it ended."""
    with contextlib.closing(Cancel()) as cancel:
        result = run(request(*words, live_stdout=1, cancel=cancel))
    sys.stdout.write(f"{result.outcome}: {printable(result.reason)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
