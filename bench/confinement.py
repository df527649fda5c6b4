"""Measure how much confinement delays a program's start, and how much the audit slows down system calls.

    .venv/bin/python -m bench.confinement [--rounds 15]

A start is the time from the message EXEC until the program runs, by the host's clock, in a clone, with a cached build.
The cases are interleaved. The program itself times system calls. The guest's audit records denied ones.
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
from x07_sandbox.policy.decode import default_policy

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
    double started = now();
    for (int i = 0; i < 50000; i++) stat("/usr/bin/true", &info);
    printf("%.2f ", (now() - started) / 50000);
    started = now();
    for (int i = 0; i < 50000; i++) open("/no/such/file", O_RDONLY);
    printf("%.2f ", (now() - started) / 50000);
    started = now();
    for (int i = 0; i < 1000; i++) open("/usr/bin/true", O_WRONLY);
    printf("%.2f\\n", (now() - started) / 1000);
    return 0;
}
"""


def policies() -> dict[str, Policy]:
    """Return the default policy and stricter ones, by what they forbid."""
    default = default_policy()
    process = default.process
    return {
        "nothing": default,
        "threads": replace(default, threads=replace(default.threads_in_force, enabled=False)),
        "children": replace(default, process=replace(process, allow_spawn=False)),
        "executing": replace(default, process=replace(process, allow_exec=False)),
        "programs not on a list": replace(
            default, process=replace(process, allow_execs=("/usr/bin/true",), allow_exec_prefixes=())
        ),
    }


def start_ms(program: tuple[str, str], policy: Policy) -> float:
    """Return the time from EXEC until the program runs in a clone."""
    toolchain, source = program
    result = run_program(source=source, toolchain=toolchain, policy=policy, check=True)
    phase = result.phases["run"]
    if phase.start != "hot" or any(control.state == "refused" for control in result.controls):
        raise SystemExit(f"a timed run did not use a hot clone, or a control was refused: start {phase.start}")
    return phase.times_ms["started"] - phase.times_ms["seeded"]


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description="Measure the cost of confinement and audit.")
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    cases = [(name, forbidden) for name in PROGRAMS for forbidden in policies()]
    times: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    for number in range(rounds + 1):
        for name, forbidden in random.sample(cases, len(cases)):
            milliseconds = start_ms(PROGRAMS[name], policies()[forbidden])
            if number:  # round 0 builds the program and saves the template
                times[name, forbidden].append(milliseconds)
    print(f"EXEC until the program runs, medians of {rounds} rounds")
    for name, forbidden in cases:
        median = statistics.median(times[name, forbidden])
        more = median - statistics.median(times[name, "nothing"])
        print(f"  {name}, forbidden: {forbidden}: {median:.0f} ms ({more:+.0f})")
    with tempfile.TemporaryDirectory(prefix="x07-bench-") as folder:
        source = Path(folder) / "calls.c"
        source.write_text(CALLS)
        outputs = [run_program(source, check=True).stdout.text or "" for _ in range(5)]
    stat, missing, refused = (
        statistics.median(column) for column in zip(*(map(float, line.split()) for line in outputs), strict=True)
    )
    print("microseconds per call, medians of 5")
    print(
        f"  stat {stat:.1f}, open that fails with ENOENT {missing:.1f}, open that is denied and recorded {refused:.1f}"
    )


if __name__ == "__main__":
    main()
