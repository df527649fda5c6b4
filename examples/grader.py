"""Grades 200 submissions, none of them trusted, and prints a table of verdicts.

    python examples/grader.py [SUBMISSIONS]

The task: read whole numbers, one a line, and print their sum. There are two tests; each runs a submission in a
machine of its own, as many at once as this host holds; what it does to its machine is nobody else's business.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from x07_sandbox import Pool, SandboxError

POLICY = Path(__file__).parent / "policies" / "grader.json"
TESTS = ((b"1\n2\n3\n", "6\n"), (b"-5\n10\n", "5\n"))

# What people hand in: language, text. "{n}" makes submissions that differ from each other.
PYTHON_GOOD = "import sys\nprint(sum(int(line) for line in sys.stdin))  # {n}\n"
C_GOOD = (
    '#include <stdio.h>\nint main(void) { long s = 0, x; while (scanf("%ld", &x) == 1) s += x; printf("%ld\\n", s); }\n'
)
KINDS = (
    ("python", PYTHON_GOOD.replace("{n}", "0")),
    ("c", C_GOOD),
    ("python", PYTHON_GOOD.replace("{n}", "1")),
    ("python", "print(6)\n"),  # knows the first test only
    ("shell", "paste -sd+ | sed 's/+-/-/g' | { read -r sum; echo $((sum)); }\n"),
    ("python", "import sys\nprint(sum(map(int, sys.stdin))\n"),  # does not compile
    ("python", "while True: pass\n"),
    ("python", "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n"),
    ("python", "kept = []\nwhile True: kept.append(b'x' * (1 << 20))\n"),
    ("c", "int main(void) { return *(volatile int *)0; }\n"),
    ("python", "while True: print('6' * 4096)\n"),
    ("python", "import sys\nsys.exit(open('/x07/answers').read())\n"),
)


def grade(pool: Pool, toolchain: str, source: str) -> str:
    """One word for a submission: how the first test that it does not pass ended."""
    for data, expected in TESTS:
        try:
            result = pool.submit(
                None, data, source=source, toolchain=toolchain, policy=POLICY, timeout_s=10, max_output_bytes=100_000
            ).result()
        except SandboxError as exc:  # not the submission's fault: say so, and grade the rest
            print(exc, file=sys.stderr)
            return "not graded"
        if result.outcome != "ok":
            return result.outcome
        if result.stdout.text != expected:
            return "wrong answer"
    return "accepted"


def main() -> int:
    """Grade as many submissions as asked for, 200 by default."""
    parser = argparse.ArgumentParser(description="Grade submissions that nobody trusts.")
    parser.add_argument("submissions", nargs="?", type=int, default=200, help="how many (default: 200)")
    count = parser.parse_args().submissions
    # The pool is left first: after Ctrl-C it cancels what the graders' threads wait for.
    with ThreadPoolExecutor(8) as graders, Pool(size=2) as pool:
        verdicts = Counter(graders.map(lambda number: grade(pool, *KINDS[number % len(KINDS)]), range(count)))
    print(f"{'verdict':14} submissions")
    for word, number in sorted(verdicts.items(), key=lambda item: (-item[1], item[0])):
        print(f"{word:14} {number:11}")
    return 1 if verdicts["not graded"] else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SandboxError as exc:  # no image, say
        sys.exit(f"grader: {exc}")
