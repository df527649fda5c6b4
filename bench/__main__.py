"""Measure and print the table.

    .venv/bin/python -m bench [--rounds 15] [--only TEXT] [--json FILE] [--short]

Each round runs every case once, so that other load on the host affects all cases alike. A case that fails is recorded
with its error, the others go on, and the exit status is 1. Needs root for podman and docker; install podman, runc and
docker.io with apt. If no Docker daemon runs, one is started, on a socket of its own. 15 rounds take about 20 minutes,
most of it for cases that boot VMs and for sandboxes. --short runs every case once, in a minute: it shows that the
benchmark works, but its figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bench import peers, sandboxes, scale
from bench.figures import C_PROGRAM, PYTHON_PROGRAM, Figures, WrongRunError, at_once_seconds
from bench.ours import X07, Command, Floor, Pooled, next_command_seconds, not_hot
from x07_sandbox.images.store import find_image

if TYPE_CHECKING:
    from collections.abc import Callable

Cases = dict[str, "Callable[[], float]"]


class Suite:
    """The cases to time, by name. A group of cases that cannot be set up is recorded as an error."""

    def __init__(self, figures: Figures, work: Path, stack: contextlib.ExitStack, *, short: bool) -> None:
        self.cases: Cases = {}
        self.floor: Floor | None = None
        self.pools: Pooled | None = None
        self.work = work
        self.sources = {"C": work / "prog.c", "Python": work / "prog.py"}
        self._stack = stack
        self._pool_stack = stack.enter_context(contextlib.ExitStack())
        self._short = short
        self._sizes = sandboxes.SHORT if short else sandboxes.FULL
        groups = {"x07 run": self._x07, "pools": self._pooled, "raw clones": self._raw}
        groups |= {"sandboxes": self._sandboxes, "other tools": self._peers}  # side by side, to be compared
        for name, group in groups.items():
            with figures.recording(name):
                group()

    def settle(self) -> None:
        """Wait until both pools are full, so that they do not disturb the next timing."""
        if self.pools is not None and not self._short:
            self.pools.settle()

    def end_pools(self) -> None:
        """End the pools after the last case that uses one."""
        self.pools = None
        self._pool_stack.close()

    def cached_c(self) -> Command:
        """Return the case that is also run many times at once."""
        return Command(program=self.sources["C"], flags=("--no-pool",), start="hot", built="cache")

    def _x07(self) -> None:
        self.sources["C"].write_text(C_PROGRAM)
        self.sources["Python"].write_text(PYTHON_PROGRAM)
        for name, program in self.sources.items():
            subprocess.run([X07, "run", program], input=b"x\n", check=True, capture_output=True)  # builds and caches it
            cold = Command(program=program, flags=("--cold", "--no-cache"), start="cold", built="build")
            if self._short:  # one VM instead of two
                cold = Command(program=program, flags=("--cold",), start="cold", built="cache")
            built = Command(program=program, flags=("--no-pool", "--no-cache"), start="hot", built="build")
            cached = Command(program=program, flags=("--no-pool",), start="hot", built="cache")
            self.cases |= {f"x07 {name}, cold": cold.seconds, f"x07 {name}, built": built.seconds}
            self.cases |= {f"x07 {name}, cached": cached.seconds, f"x07 {name}, saved VM": not_hot(cached).seconds}
        subprocess.run(["gcc", "-O2", "-o", self.work / "c", self.sources["C"]], check=True, capture_output=True)
        self.cases["bare exec, C"] = peers.Peer(argv=(str(self.work / "c"),)).seconds
        self.cases["bare exec, Python"] = peers.Peer(argv=("/usr/bin/python3", str(self.sources["Python"]))).seconds

    def _pooled(self) -> None:
        self.pools = pools = Pooled(self._pool_stack, size=2 * len(self.sources) if self._short else 2)
        pools.settle()
        for name, program in self.sources.items():
            alone = Command(program=program, flags=(), start="pool", built="cache")
            self.cases[f"x07 {name}, from the pool"] = replace(alone, front=True).seconds
            self.cases[f"x07 {name}, from the pool, no front"] = alone.seconds
        self.cases["library C, warm"] = partial(pools.library_seconds, self.sources["C"])

    def _raw(self) -> None:
        self.floor = floor = Floor(self._stack, self.work / "c")
        self.cases["QEMU, started and stopped"] = floor.quit_seconds
        self.cases["clone, until it answers"] = partial(floor.answer_seconds, hot=False)
        self.cases["hot clone, until it answers"] = partial(floor.answer_seconds, hot=True)
        self.cases["hot clone that runs C"] = floor.program_seconds
        box = floor.sandbox(self._stack)
        next_command_seconds(box)  # the first takes the process that waits
        self.cases["next command in a VM, C"] = partial(next_command_seconds, box)

    def _sandboxes(self) -> None:
        if self.pools is None:
            raise WrongRunError("there is no pool to open sandboxes from")
        found = sandboxes.Sandboxes(self._pool_stack, self.pools.pool, self._sizes)
        self.cases |= found.cases() | sandboxes.Transfers(found.held, self.work, self._sizes.mib).cases()
        self.pools.settle()

    def _peers(self) -> None:
        root = peers.unpacked_root(find_image(None).folder / "root.erofs", self.work)
        shutil.copy(self.work / "c", root / "prog/c")
        shutil.copy(self.sources["Python"], root / "prog/prog.py")
        engines = {"podman+runc": peers.podman(root, self.work)}
        skipped = {"podman+runc": "needs root, podman and runc"}
        if engines["podman+runc"] is not None:
            self._stack.callback(peers.forget_podman, self.work)
        client, reason = peers.docker_client(self.work, self._stack)
        for runtime in ("runc", "runsc"):
            skipped[f"docker+{runtime}"] = reason or f"the daemon does not have {runtime}"
            engines[f"docker+{runtime}"] = peers.docker(client, root, self.work, runtime) if client else None
        for name in ("podman", "docker"):
            if (argv := engines[f"{name}+runc"]) is not None:
                self._in_container(name, peers.container(argv, self._stack))
        for name, command in {"C": ["/prog/c"], "Python": ["/usr/bin/python3", "/prog/prog.py"]}.items():
            self.cases[f"bwrap, {name}"] = peers.bwrap(root, command).seconds
            for engine, argv in engines.items():
                if argv is not None:
                    self.cases[f"{engine}, {name}"] = peers.Peer(argv=(*argv, *command)).seconds
        for engine in (name for name, argv in engines.items() if argv is None):
            print(f"not timed: {engine}: {skipped[engine]}")

    def _in_container(self, name: str, container: peers.Container) -> None:
        count = self._sizes.at_once
        self.cases[f"{name} exec, C"] = container.peer(["/prog/c"]).seconds
        self.cases[f"{name} exec true"] = container.true_seconds
        self.cases[f"{name} exec true, {count} at once"] = partial(at_once_seconds, container.true, count)


def measure(figures: Figures, options: argparse.Namespace, stack: contextlib.ExitStack) -> None:
    """Time all cases in turn, then measure what is measured once."""
    work = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp", prefix="x07-bench-")))
    suite = Suite(figures, work, stack, short=options.short)
    found = {name: case for name, case in suite.cases.items() if any(text in name for text in options.only.split(","))}
    for turn in range(1 if options.short else 0, options.rounds + 1):
        print(f"round {turn} of {options.rounds}")
        for name, case in found.items():
            suite.settle()
            figures.time(name, case, counts=turn > 0)
    suite.end_pools()
    if not options.only:
        sizes = scale.SHORT if options.short else scale.FULL
        for name, step in scale.steps(suite.cached_c(), suite.floor, work, sizes).items():
            with figures.recording(name):
                for row, value in step():
                    figures.row(row, value)


def main() -> None:
    """Measure, print and write the times."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=None, help="timed rounds (default: 15, or 1 with --short)")
    parser.add_argument(
        "--only", default="", metavar="TEXT,...", help="run only cases whose names contain one of these texts"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and errors to FILE")
    parser.add_argument("--short", action="store_true", help="run every case once, to see whether it works")
    options = parser.parse_args()
    if options.rounds is None:
        options.rounds = 1 if options.short else 15
    os.environ["X07_VM_SAVE_FIRST"] = "1"  # nothing may run beside what is timed
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # without byte code, each run would compile x07's modules
    # Handle SIGTERM like Ctrl-C, so that the pool, containers and files are removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    figures = Figures(options.json)
    try:
        with contextlib.ExitStack() as stack:
            measure(figures, options, stack)
    finally:
        figures.show()
    sys.exit(1 if figures.errors else 0)


if __name__ == "__main__":
    main()
