"""Measure and print the table.

    .venv/bin/python -m bench [--rounds 15] [--only TEXT] [--json FILE]

Each round runs every case once, so that other load on the host affects all cases alike. Needs root for podman; install
podman and runc with apt. 15 rounds take about half an hour, most of it for cases that boot VMs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bench import peers, programs, scale
from bench.ours import X07, Command, Floor, Pooled
from x07_sandbox.images.store import find_image

if TYPE_CHECKING:
    from collections.abc import Callable

RATIOS = (
    ("clone ready / QEMU started and stopped", "clone, until it answers", "QEMU, started and stopped", 3.4, 2.2),
    ("x07 run, cached C / podman", "x07 C, cached", "podman+runc, C", 2.5, 1.4),
    ("x07 run, cached Python / podman", "x07 Python, cached", "podman+runc, Python", 3.0, 1.6),
    ("x07 run, C from the pool / podman", "x07 C, from the pool", "podman+runc, C", 1.0, 0.5),
    ("x07 run, Python from the pool / podman", "x07 Python, from the pool", "podman+runc, Python", 1.0, 0.5),
)
# One median minus the other, in ms.
DIFFERENCES = (
    ("library call on a warm VM, minus bare exec", "library C, warm", "bare exec, C", 60, 20),
    ("x07 run of C, minus the clone itself", "x07 C, cached", "clone that runs C", 150, 80),
)


def cases(work: Path, stack: contextlib.ExitStack) -> tuple[dict[str, Callable[[], float]], Pooled, Floor]:
    """Return the cases to time, by name; the pools, which must be idle before each case; and the raw clones."""
    c, python = work / "prog.c", work / "prog.py"
    c.write_text(programs.C)
    python.write_text(programs.PYTHON)
    found: dict[str, Callable[[], float]] = {}
    for name, program in (("C", c), ("Python", python)):
        subprocess.run([X07, "run", program], input=b"x\n", check=True, capture_output=True)  # builds and caches it
        cold = Command(program=program, flags=("--cold", "--no-cache"), start="cold", built="build")
        cloned = Command(program=program, flags=("--no-pool", "--no-cache"), start="clone", built="build")
        cached = Command(program=program, flags=("--no-pool",), start="clone", built="cache")
        pooled = Command(program=program, flags=(), start="pool", built="cache")
        found |= {f"x07 {name}, cold": cold.seconds, f"x07 {name}, built": cloned.seconds}
        found |= {f"x07 {name}, cached": cached.seconds, f"x07 {name}, from the pool": pooled.seconds}
    root = peers.unpacked_root(find_image(None).folder / "root.erofs", work)
    subprocess.run(["gcc", "-O2", "-o", root / "prog/c", c], check=True)
    pools = Pooled(stack)
    found["library C, warm"] = partial(pools.library_seconds, c)
    floor = Floor(stack, root / "prog/c")
    found |= {"QEMU, started and stopped": floor.quit_seconds, "clone, until it answers": floor.answer_seconds}
    found["clone that runs C"] = floor.program_seconds
    shutil.copy(python, root / "prog/prog.py")
    commands = {"C": ["/prog/c"], "Python": ["/usr/bin/python3", "/prog/prog.py"]}
    engines = {"podman+runc": peers.podman(root, work)}
    if engines["podman+runc"] is not None:
        stack.callback(peers.forget_podman, work)
    engines |= {f"docker+{runtime}": peers.docker(root, work, runtime) for runtime in ("runc", "runsc")}
    for name, command in commands.items():
        found[f"bwrap, {name}"] = peers.bwrap(root, command).seconds
        for engine, argv in engines.items():
            if argv is not None:
                found[f"{engine}, {name}"] = peers.Peer(argv=(*argv, *command)).seconds
    found["bare exec, C"] = peers.Peer(argv=(str(root / "prog/c"),)).seconds
    found["bare exec, Python"] = peers.Peer(argv=("/usr/bin/python3", str(python))).seconds
    return found, pools, floor


def main() -> None:
    """Measure, print and write the times."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--only", default="", metavar="TEXT,...", help="run only cases whose names contain one of these texts"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times to FILE")
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # without byte code, each run would compile x07's modules
    # Handle SIGTERM like Ctrl-C, so that the pool, containers and files are removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp", prefix="x07-bench-")))
        every, pools, floor = cases(work, stack)
        found = {name: case for name, case in every.items() if any(text in name for text in options.only.split(","))}
        times: dict[str, list[float]] = {name: [] for name in found}
        for turn in range(options.rounds + 1):
            sys.stderr.write(f"\rround {turn} of {options.rounds} (round 0 is not counted)")
            for name, case in found.items():
                pools.settle()
                seconds = case()
                if turn:
                    times[name].append(seconds)
        sys.stderr.write("\n")
        rows = []
        if not options.only:
            pools.settle()
            command = Command(program=work / "prog.c", flags=("--no-pool",), start="clone", built="cache")
            rows = scale.table(command, floor, work, lambda text: print(text, file=sys.stderr))
    show(times)
    for name, value in rows:
        print(f"{name:60} {value}")
    if options.json is not None:
        options.json.write_text(json.dumps(times, indent=1))


def show(times: dict[str, list[float]]) -> None:
    """Print the table, the ratios, and the tools that were not timed."""
    print(f"{'':28} {'median':>9} {'min':>9} {'max':>9}   ms, {os.cpu_count()} cores")
    medians = {name: statistics.median(values) for name, values in times.items() if values}
    for name, median in medians.items():
        print(f"{name:28} {median * 1000:9.1f} {min(times[name]) * 1000:9.1f} {max(times[name]) * 1000:9.1f}")
    for title, over, under, limit, goal in RATIOS:
        if over in medians and under in medians:
            print(f"{title:42} {medians[over] / medians[under]:6.2f}   limit {limit}, goal {goal}")
    for title, whole, part, limit, goal in DIFFERENCES:
        if whole in medians and part in medians:
            left = (medians[whole] - medians[part]) * 1000
            print(f"{title:50} {left:6.0f} ms   limit {limit}, goal {goal}")
    for engine in ("podman+runc", "docker+runc", "docker+runsc"):
        if f"{engine}, C" not in times:
            print(f"not timed: {engine}")


if __name__ == "__main__":
    main()
