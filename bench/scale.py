"""Many runs at once, memory use and growth with input and records. Each is measured once, after the rounds."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final
from unittest import mock

from bench.figures import COUNT_PROGRAM, at_once_seconds, memory_bytes
from bench.ours import X07, Command, Floor, check, not_hot, waiting_run
from x07_sandbox.host.paths import state_dir

MIB: Final = 1 << 20


def at_once(command: Command, count: int, slots: int) -> float:
    """Return the seconds for *count* runs started together, with *slots* running at a time."""
    with mock.patch.dict(os.environ, X07_VM_MAX_RUNNING=str(slots)):
        return at_once_seconds(command.seconds, count)


def memory_mib(command: Command, floor: Floor, count: int, idle_count: int) -> tuple[float, float]:
    """Return the PSS in MiB of each of *count* clones that run a C program, and of an idle clone.

    Each run is a process, as for a user: a single one has not enough low descriptors for so many clones.
    """
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(floor.idle()) for _ in range(idle_count)]
        each_idle = sum(memory_bytes(pid)["Pss"] for pid in idle) / len(idle)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, X07_VM_MAX_RUNNING=str(count)))
        running = [stack.enter_context(waiting_run(command.program)) for _ in range(count)]
        return sum(memory_bytes(pid)["Pss"] for pid in running) / count / MIB, each_idle / MIB


def input_seconds(work: Path, size: int) -> float:
    """Return the seconds for a C program that counts *size* bytes of input."""
    source = work / "count.c"
    source.write_text(COUNT_PROGRAM)
    data = os.urandom(size)
    argv = [str(X07), "run", "--no-pool", "--json=full", str(source)]
    subprocess.run(argv, input=b"", capture_output=True, check=True)  # builds it
    started = time.monotonic()
    done = subprocess.run(argv, input=data, capture_output=True, check=True)
    seconds = time.monotonic() - started
    check(done.stdout, f"{size}\n".encode(), start="hot", built="cache")
    return seconds


def jobs_on_record() -> int:
    """Return the number of job records. The time of a start must not grow with it."""
    return sum(1 for _ in state_dir().iterdir())


@contextlib.contextmanager
def more_jobs(count: int) -> Iterator[None]:
    """Add *count* copies of an ended job's record, and remove them on exit."""
    ended = next(state_dir().glob("*/done")).parent
    with contextlib.ExitStack() as stack:
        for number in range(count):
            copy = state_dir() / f"{number}-{os.getpid()}-0-run"
            stack.callback(shutil.rmtree, copy, ignore_errors=True)
            shutil.copytree(ended, copy)
        yield


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much to measure. inputs_mib: sizes of the program's input. records: number of job records to add."""

    at_once: tuple[int, ...]
    many: int
    idle: int
    inputs_mib: tuple[int, ...]
    records: int


FULL: Final = Sizes(at_once=(1, 10, 50), many=50, idle=4, inputs_mib=(1, 4, 16), records=1000)
SHORT: Final = Sizes(at_once=(1,), many=2, idle=1, inputs_mib=(1,), records=2)

Rows = Iterator[tuple[str, str]]


def steps(command: Command, floor: Floor | None, work: Path, sizes: Sizes) -> dict[str, Callable[[], Rows]]:
    """Return what to measure, by name. Each step yields rows of name and value. floor: None if it could not be made."""
    found: dict[str, Callable[[], Rows]] = {"runs at once": partial(_at_once_rows, command, sizes)}
    if floor is not None:
        found |= {
            "queue": partial(_queue_rows, command, floor, sizes),
            "memory": partial(_memory_rows, command, floor, sizes),
        }
    return found | {"input": partial(_input_rows, work, sizes), "records": partial(_record_rows, command, sizes)}


def _at_once_rows(command: Command, sizes: Sizes) -> Rows:
    for count in sizes.at_once:
        seconds = at_once(command, count, count)
        yield f"{count} runs, all at once", f"{seconds:.2f} s, {seconds / count * 1000:.0f} ms each"


def _queue_rows(command: Command, floor: Floor, sizes: Sizes) -> Rows:
    queued = at_once(command, sizes.many, 2)
    yield f"{sizes.many} runs through the queue, two at a time", f"{queued:.2f} s"
    raw = at_once_seconds(floor.program_seconds, sizes.many, threads=2)
    yield f"{sizes.many} raw clones, two at a time", f"{raw:.2f} s"
    yield "through the queue / raw (limit 1.5, goal 1.1)", f"{queued / raw:.2f}"
    clones = at_once(not_hot(command), sizes.many, 2)
    yield f"{sizes.many} runs on clones of a saved VM, two at a time", f"{clones:.2f} s"
    yield "through the queue, hot / saved VM (limit 0.45)", f"{queued / clones:.2f}"


def _memory_rows(command: Command, floor: Floor, sizes: Sizes) -> Rows:
    active, idle = memory_mib(command, floor, sizes.many, sizes.idle)
    yield f"PSS of a clone that runs C, {sizes.many} alive (limit 45 MB, goal 30)", f"{active * MIB / 1e6:.1f} MB"
    yield "PSS of an idle clone", f"{idle * MIB / 1e6:.0f} MB"


def _input_rows(work: Path, sizes: Sizes) -> Rows:
    for size in sizes.inputs_mib:
        yield f"input of {size} MiB", f"{input_seconds(work, size * MIB):.2f} s"


def _record_rows(command: Command, sizes: Sizes) -> Rows:
    count = jobs_on_record()
    seconds = command.seconds()
    with more_jobs(sizes.records):
        more_seconds = command.seconds()
    name = f"a run with {count} job records, and with {sizes.records} more"
    yield name, f"{seconds * 1000:.0f} and {more_seconds * 1000:.0f} ms"
