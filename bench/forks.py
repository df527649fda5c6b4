"""Time forks, snapshots and rollbacks of sandboxes, beside sandboxes that are prepared anew.

    .venv/bin/python -m bench.forks [--rounds 9] [--tries 16]

Each round runs every case once. The parent has touched 50 MiB of memory and written 50 MiB to its disk. The pause is
from HOLD to RESUME; "answers" is from RESUME until the fork has confirmed its clock and the call has returned. At last,
*tries* forks are open at once, and each has hashed its memory; and the tests of a project are run in forks of a sandbox
in which it was prepared, and in sandboxes that are each prepared.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.figures import memory_bytes
from x07_sandbox import Sandbox
from x07_sandbox.host.linux import children_of
from x07_sandbox.sessions.session import Session

if TYPE_CHECKING:
    from collections.abc import Sequence

MIB: Final = 1 << 20
PROGRAM: Final = """
import hashlib, os, sys
kept = bytearray(os.urandom(50 << 20))
with open("written", "wb") as file:
    file.write(os.urandom(50 << 20))
print("ready", flush=True)
for line in sys.stdin:
    print(hashlib.sha256(kept).hexdigest(), flush=True)
"""
MODULES: Final = 60
MODULE: Final = "def work(n):\n    return sum(i * i for i in range(n))\n" + "\n".join(
    f"def f{n}(a, b=None, *c, **d):\n    return {{'n': {n}, 'a': a, 'b': b, 'c': c, 'd': d}}\n" for n in range(60)
)
TEST: Final = "import unittest, m{0}\nclass Test(unittest.TestCase):\n    def test(self):\n        m{0}.work(10)\n"
PREPARE: Final = "python3 -m compileall -q . && python3 -m unittest -q 2> /dev/null"
RUN: Final = "python3 -m unittest -q"


class Marks:
    """When the last pause began and ended, in seconds on the monotonic clock."""

    began = ended = 0.0


@contextlib.contextmanager
def marked() -> Iterator[Marks]:
    """Note each pause in the context."""
    marks, hold, go_on = Marks(), Session.hold, Session.go_on

    def timed_hold(self: Session) -> None:
        marks.began = time.monotonic()
        hold(self)

    def timed_go_on(self: Session) -> None:
        go_on(self)
        marks.ended = time.monotonic()

    Session.hold, Session.go_on = timed_hold, timed_go_on  # type: ignore[method-assign]
    try:
        yield marks
    finally:
        Session.hold, Session.go_on = hold, go_on  # type: ignore[method-assign]


@contextlib.contextmanager
def parent() -> Iterator[Sandbox]:
    """Open a sandbox in which the program runs."""
    with Sandbox(lifetime_s=36_000) as sandbox:
        process = sandbox.start(["python3", "-c", PROGRAM])
        process.read_until(b"\n", timeout_s=120)
        sandbox.exec(["true"])
        yield sandbox


def seconds(call: Callable[[], object]) -> float:
    """Time a call."""
    began = time.monotonic()
    call()
    return time.monotonic() - began


def one_round(sandbox: Sandbox, marks: Marks, found: dict[str, list[float]]) -> None:
    """Time every case once."""

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    forks: list[Sandbox] = []
    points: list[int] = []
    note("fork(), whole", seconds(lambda: forks.extend(sandbox.fork())))
    note("pause", marks.ended - marks.began)
    note("a fork answers", time.monotonic() - marks.ended)
    note("first command of a fork", seconds(lambda: forks[0].exec(["true"], check=True)))
    note("second command of a fork", seconds(lambda: forks[0].exec(["true"], check=True)))
    note("command of the parent", seconds(lambda: sandbox.exec(["true"], check=True)))
    forks[0].kill()
    note("checkpoint()", seconds(lambda: points.append(sandbox.checkpoint())))
    note("rollback()", seconds(lambda: sandbox.rollback(points[0])))
    snapshot = sandbox.snapshot()
    for name, kept in (("a snapshot", snapshot), ("the image", None)):
        began = time.monotonic()
        opened = Sandbox(snapshot=kept)
        note(f"Sandbox() from {name}", time.monotonic() - began)
        note(f"then exec true, {name}", seconds(partial(opened.exec, ["true"], check=True)))
        opened.kill()
    snapshot.remove()


def sizes(sandboxes: Sequence[Sandbox]) -> list[int]:
    """Return the proportional set sizes of the QEMU processes of sandboxes, in bytes."""
    found = []
    for one in sandboxes:
        pids = [one._open._job.instance.child.pid]  # type: ignore[attr-defined]  # noqa: SLF001 - no call tells it
        for pid in pids:
            pids += children_of(pid)
        found.append(sum(memory_bytes(pid).get("Pss", 0) for pid in pids))
    return found


def at_once(sandbox: Sandbox, count: int) -> None:
    """Show the memory that *count* forks take, which all have hashed theirs."""
    number = 1
    forks: list[Sandbox] = []
    took = seconds(lambda: forks.extend(sandbox.fork(count)))
    for one in forks:
        process = one.process(number)
        process.write(b"\n")
        process.read_until(b"\n", timeout_s=120)
    pss = sizes(forks)
    print(f"{count} forks at once: {took:.2f} s, {statistics.mean(pss) / MIB:.0f} MiB PSS each ({max(pss) / MIB:.0f})")
    for one in forks:
        one.kill()


def tests(count: int) -> None:
    """Compare *count* tries of a project's tests, in forks and in sandboxes that are each prepared, two at a time."""
    with tempfile.TemporaryDirectory() as place:
        for number in range(MODULES):
            Path(place, f"m{number}.py").write_text(MODULE)
            Path(place, f"test_{number}.py").write_text(TEST.format(number))

        def anew() -> int:
            with Sandbox(workdir=place) as sandbox:
                sandbox.shell(PREPARE, check=True)
                sandbox.shell(RUN, check=True)
                size = sizes([sandbox])[0]
                sandbox.kill()
                return size

        def forked() -> list[int]:
            with Sandbox(workdir=place) as sandbox:
                sandbox.shell(PREPARE, check=True)
                forks = sandbox.fork(count)
                with ThreadPoolExecutor(2) as threads:
                    list(threads.map(lambda one: one.shell(RUN, check=True), forks))
                found = sizes(forks)
                for one in (*forks, sandbox):
                    one.kill()
                return found

        began = time.monotonic()
        pss = forked()
        in_forks_s = time.monotonic() - began
        began = time.monotonic()
        with ThreadPoolExecutor(2) as threads:
            each = list(threads.map(lambda _number: anew(), range(count)))
        anew_s = time.monotonic() - began
    mean, alone = (statistics.mean(one) / MIB for one in (pss, each))
    print(
        f"{count} tries: {in_forks_s:.1f} s in forks ({mean:.0f} MiB each, all open), {anew_s:.1f} s anew ({alone:.0f})"
    )


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tries", type=int, default=16)
    options = parser.parse_args()
    found: dict[str, list[float]] = {}
    with marked() as marks, parent() as sandbox:
        for _ in range(options.rounds):
            one_round(sandbox, marks, found)
        for name, values in found.items():
            print(
                f"{name}: {statistics.median(values) * 1000:.0f} ms"
                f" ({min(values) * 1000:.0f} to {max(values) * 1000:.0f})"
            )
        at_once(sandbox, options.tries)
    tests(options.tries)


if __name__ == "__main__":
    main()
