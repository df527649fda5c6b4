"""Measure what confinement adds to a program's start in a fresh clone, and the audit to system calls.

    .venv/bin/python -m bench.confinement [--rounds 15]

Starts are from START to the program, by the host's clock, in clones of one template that take turns; the artifact was
built before. Calls are timed by the program itself; a refused one is recorded by the guest's audit.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from x07_sandbox import Policy, run_program
from x07_sandbox.policy import default_policy

PROGRAMS: Final = {"C": ("c", "int main(void) { return 0; }\n"), "Python": ("python", "pass\n")}
CALLS: Final = """\
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <time.h>
static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}
int main(void) {
    struct stat info;
    double begun = now();
    for (int i = 0; i < 50000; i++) stat("/usr/bin/true", &info);
    printf("%.2f ", (now() - begun) / 50000);
    begun = now();
    for (int i = 0; i < 50000; i++) open("/no/such/file", O_RDONLY);
    printf("%.2f ", (now() - begun) / 50000);
    begun = now();
    for (int i = 0; i < 1000; i++) open("/usr/bin/true", O_WRONLY);
    printf("%.2f\\n", (now() - begun) / 1000);
    return 0;
}
"""


def policies() -> dict[str, Policy]:
    """The usual one, and those that forbid more, by what they forbid."""
    usual = default_policy()
    process = usual.process
    return {
        "nothing": usual,
        "threads": replace(usual, threads=replace(usual.threads_in_force, enabled=False)),
        "children": replace(usual, process=replace(process, allow_spawn=False)),
        "executing": replace(usual, process=replace(process, allow_exec=False)),
        "what is not on a list": replace(
            usual, process=replace(process, allow_execs=("/usr/bin/true",), allow_exec_prefixes=())
        ),
    }


def start_ms(program: tuple[str, str], policy: Policy) -> float:
    """From START to the program, in a clone."""
    toolchain, source = program
    result = run_program(source=source, toolchain=toolchain, policy=policy, check=True)
    phase = result.phases["run"]
    if phase.start != "clone" or any(control.state == "refused" for control in result.controls):
        raise SystemExit(f"a timed run was no clone, or something was not enforced: {phase.start}")
    return phase.times_ms["started"] - phase.times_ms["seeded"]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description="Measure what confinement and audit cost.")
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    cases = [(name, forbidden) for name in PROGRAMS for forbidden in policies()]
    taken: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    for number in range(rounds + 1):
        for name, forbidden in random.sample(cases, len(cases)):
            milliseconds = start_ms(PROGRAMS[name], policies()[forbidden])
            if number:  # the first round builds, and saves the template
                taken[name, forbidden].append(milliseconds)
    print(f"START to the program, medians of {rounds}")
    for name, forbidden in cases:
        median = statistics.median(taken[name, forbidden])
        more = median - statistics.median(taken[name, "nothing"])
        print(f"  {name}, forbidden: {forbidden}: {median:.0f} ms ({more:+.0f})")
    with tempfile.TemporaryDirectory(prefix="x07-bench-") as folder:
        source = Path(folder) / "calls.c"
        source.write_text(CALLS)
        told = [run_program(source, check=True).stdout.text or "" for _ in range(5)]
    stat, missing, refused = (
        statistics.median(column) for column in zip(*(map(float, line.split()) for line in told), strict=True)
    )
    print("microseconds a call, medians of 5")
    print(
        f"  stat {stat:.1f}, an open that ends with ENOENT {missing:.1f}, a refused open that is recorded {refused:.1f}"
    )


if __name__ == "__main__":
    main()
