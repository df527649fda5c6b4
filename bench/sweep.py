"""Measure a sweep of dead jobs among live ones, and the sweep before a run if there is nothing to remove.

    .venv/bin/python -m bench.sweep [--jobs 1000] [--rounds 5]

The records are in a temporary folder. Half of them have a dead owner; this process owns the others.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from x07_sandbox.backends.registry import find
from x07_sandbox.host.processes import Identity, own_identity
from x07_sandbox.records.pruning import Pruner
from x07_sandbox.records.runs import Claim, create_record, mark_done, new_run_id, write_owner
from x07_sandbox.records.stopping import live_records
from x07_sandbox.records.sweep import sweep_jobs
from x07_sandbox.sessions import run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from x07_sandbox.records.runs import JobRecord

_DEAD = Identity(pid=2**22 - 1, start_ticks=1)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description="Measure the sweep.")
    parser.add_argument("--jobs", type=int, default=1000, help="number of dead jobs, and of live jobs")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    live_records("qemu")  # imports modules, which is not part of the measurement
    sweeps, again = zip(*[_round(options.jobs) for _ in range(options.rounds)], strict=True)
    print(f"sweep of {options.jobs} dead jobs among {options.jobs} live ones: {statistics.median(sweeps):.3f} s")
    print(f"next sweep, of the live jobs: {statistics.median(again):.3f} s")
    for count in (10, 500, 10_000):
        print(f"sweep before a run, with {count} ended jobs: {1000 * _before_a_run(count):.2f} ms")


def _round(count: int) -> tuple[float, float]:
    with _state():
        for runner in (own_identity(), _DEAD):
            for _ in range(count):
                _add_record(runner)
        times = []
        for expected in (count, 0):
            pruner = Pruner(lambda _text: None, dry_run=False)
            started = time.monotonic()
            live = sweep_jobs(pruner, find)
            times.append(time.monotonic() - started)
            if (len(live), len(pruner.removed)) != (count, expected):
                raise SystemExit(f"a timed sweep removed the wrong jobs: {len(live)} are live")
        return times[0], times[1]


def _before_a_run(count: int) -> float:
    with _state():
        for _ in range(count):
            mark_done(_add_record(_DEAD))
        times = []
        for _ in range(5):
            run._not_before = 0.0  # noqa: SLF001 - as in a new process
            started = time.monotonic()
            run.sweep_before_start()
            times.append(time.monotonic() - started)
        return statistics.median(times)


def _add_record(runner: Identity) -> JobRecord:
    claim = Claim(run_id=new_run_id(), phase="run", wall_ms=1000)
    record = create_record(claim, backend="qemu", image_digest=f"sha256:{'0' * 64}")
    groups = (f"/sys/fs/cgroup/memory/x07-sandbox/{record.job_id}",)
    write_owner(record, runner=runner, processes={"supervisor": runner, "inner": runner}, cgroups=groups)
    return record


@contextlib.contextmanager
def _state() -> Iterator[None]:
    with (
        tempfile.TemporaryDirectory(prefix="x07-bench-") as name,
        mock.patch.dict(os.environ, X07_VM_STATE_DIR=str(Path(name) / "jobs")),
    ):
        yield


if __name__ == "__main__":
    main()
