"""Carries out one long run in a separate process, so that a check can stop the run by its record or kill the process.

Arguments: BACKEND CODE [ARGUMENTS]. It prints the program's output, then a line with the outcome and the reason.
"""

import contextlib
import sys

from x07_sandbox.conformance.harness import caller, request
from x07_sandbox.errors import printable
from x07_sandbox.host.waiting import Cancel
from x07_sandbox.sessions.run import attempt


def main(words: list[str]) -> None:
    """Run the program that *words* describe, and print how the run ended."""
    with contextlib.closing(Cancel()) as cancel:
        result, _ = attempt(request(*words[1:]), caller(words[0], cancel, live_stdout=1))
    sys.stdout.write(f"{result.outcome}: {printable(result.reason)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
