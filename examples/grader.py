"""Grade 200 untrusted submissions and print a table of verdicts.

    python examples/grader.py [COUNT]

The task of the submissions: read integers, one per line, and print their sum. Each test of a submission runs in a VM of
its own, so that submissions cannot affect each other or the host. Several VMs run at once.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from x07_sandbox import Pool, SandboxError

POLICY = Path(__file__).parent / "policies" / "grader.json"
TESTS = ((b"1\n2\n3\n", "6\n"), (b"-5\n10\n", "5\n"))  # input, expected output

# Sample submissions: language and source. {n} makes two correct ones differ.
PYTHON_GOOD = "import sys\nprint(sum(int(line) for line in sys.stdin))  # {n}\n"
C_GOOD = (
    '#include <stdio.h>\nint main(void) { long s = 0, x; while (scanf("%ld", &x) == 1) s += x; printf("%ld\\n", s); }\n'
)
SUBMISSIONS = (
    ("python", PYTHON_GOOD.replace("{n}", "0")),
    ("c", C_GOOD),
    ("python", PYTHON_GOOD.replace("{n}", "1")),
    ("python", "print(6)\n"),  # passes only the first test
    ("shell", "paste -sd+ | sed 's/+-/-/g' | { read -r sum; echo $((sum)); }\n"),
    ("python", "import sys\nprint(sum(map(int, sys.stdin))\n"),  # syntax error
    ("python", "while True: pass\n"),
    ("python", "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n"),
    ("python", "kept = []\nwhile True: kept.append(b'x' * (1 << 20))\n"),
    ("c", "int main(void) { return *(volatile int *)0; }\n"),
    ("python", "while True: print('6' * 4096)\n"),
    ("python", "import sys\nsys.exit(open('/x07/answers').read())\n"),
)


def grade(pool: Pool, toolchain: str, source: str) -> str:
    """Return the verdict on a submission: "accepted", or how the first failed test ended."""
    for data, expected in TESTS:
        try:
            result = pool.submit(
                None, data, source=source, toolchain=toolchain, policy=POLICY, timeout_s=10, max_output_bytes=100_000
            ).result()
        except SandboxError as exc:  # a fault of the host, not of the submission
            print(exc, file=sys.stderr)
            return "not graded"
        if result.outcome != "ok":
            return result.outcome
        if result.stdout.text != expected:
            return "wrong answer"
    return "accepted"


def main() -> int:
    """Grade the submissions and print the table."""
    parser = argparse.ArgumentParser(description="Grade untrusted submissions.")
    parser.add_argument("count", nargs="?", type=int, default=200, help="number of submissions (default: 200)")
    count = parser.parse_args().count
    submissions = [SUBMISSIONS[number % len(SUBMISSIONS)] for number in range(count)]
    # The pool closes first. After Ctrl-C, this cancels the runs that the threads wait for.
    with ThreadPoolExecutor(8) as threads, Pool(size=2) as pool:
        verdicts = Counter(threads.map(lambda submission: grade(pool, *submission), submissions))
    print(f"{'verdict':14} submissions")
    for word, number in sorted(verdicts.items(), key=lambda item: (-item[1], item[0])):
        print(f"{word:14} {number:11}")
    return 1 if verdicts["not graded"] else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SandboxError as exc:  # for example, there is no guest image
        sys.exit(f"grader: {exc}")
