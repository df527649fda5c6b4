"""Measure and print the table.

    .venv/bin/python -m bench [--rounds 15] [--only TEXT] [--json FILE]

All cases take turns, round after round, so that what else the machine does hits each of them alike. Needs root for
podman; podman and runc come from apt. About half an hour at 15 rounds, most of it for machines that are booted.
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
    ("clone ready / QEMU spawned and quit", "clone, to its answer", "QEMU, spawned and quit", 3.4, 2.2),
    ("x07 run, cached C / podman", "x07 C, cached", "podman+runc, C", 2.5, 1.4),
    ("x07 run, cached Python / podman", "x07 Python, cached", "podman+runc, Python", 3.0, 1.6),
    ("x07 run, C from the pool / podman", "x07 C, from the pool", "podman+runc, C", 1.0, 0.5),
    ("x07 run, Python from the pool / podman", "x07 Python, from the pool", "podman+runc, Python", 1.0, 0.5),
)
# What is left of one when the other is taken away, in ms.
DIFFERENCES = (
    ("library call on a warm machine, beyond bare exec", "library C, warm", "bare exec, C", 60, 20),
    ("x07 run of C, beyond the clone itself", "x07 C, cached", "clone that runs C", 150, 80),
)


def cases(work: Path, stack: contextlib.ExitStack) -> tuple[dict[str, Callable[[], float]], Pooled, Floor]:
    """What is timed, by name; the pools, which must be at rest before each; the raw clones."""
    c, python = work / "prog.c", work / "prog.py"
    c.write_text(programs.C)
    python.write_text(programs.PYTHON)
    found: dict[str, Callable[[], float]] = {}
    for name, program in (("C", c), ("Python", python)):
        subprocess.run([X07, "run", program], input=b"x\n", check=True, capture_output=True)  # builds, and keeps it
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
    found |= {"QEMU, spawned and quit": floor.quit_seconds, "clone, to its answer": floor.answer_seconds}
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
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--only", default="", metavar="TEXT,...", help="only cases whose name holds one of these, separated by commas"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times there")
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed command has byte code: else each run compiles it
    # Like Ctrl-C, so that pool, containers and files are taken away on the way out.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp", prefix="x07-bench-")))
        every, pools, floor = cases(work, stack)
        found = {name: case for name, case in every.items() if any(text in name for text in options.only.split(","))}
        times: dict[str, list[float]] = {name: [] for name in found}
        for turn in range(options.rounds + 1):
            sys.stderr.write(f"\rround {turn} of {options.rounds} (0 only warms up)")
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
    """The table, the ratios, and what was left out."""
    print(f"{'':28} {'median':>9} {'least':>9} {'most':>9}   ms, {os.cpu_count()} cores")
    medians = {name: statistics.median(values) for name, values in times.items() if values}
    for name, median in medians.items():
        print(f"{name:28} {median * 1000:9.1f} {min(times[name]) * 1000:9.1f} {max(times[name]) * 1000:9.1f}")
    for title, over, under, bar, goal in RATIOS:
        if over in medians and under in medians:
            print(f"{title:42} {medians[over] / medians[under]:6.2f}   bar {bar}, goal {goal}")
    for title, whole, part, bar, goal in DIFFERENCES:
        if whole in medians and part in medians:
            left = (medians[whole] - medians[part]) * 1000
            print(f"{title:50} {left:6.0f} ms   bar {bar}, goal {goal}")
    for engine in ("podman+runc", "docker+runc", "docker+runsc"):
        if f"{engine}, C" not in times:
            print(f"not timed: {engine}")


if __name__ == "__main__":
    main()
