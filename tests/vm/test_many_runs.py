"""Many runs in one process, in sequence and in parallel: nothing leaks, and only records remain."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from tests.vm.conftest import Sandbox, left_behind, usual_start

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path

pytestmark = [pytest.mark.vm, pytest.mark.timeout(3600)]


def unfinished_files(state: Path) -> list[Path]:
    """Return the temporary files below the records."""
    return [path for path in state.rglob(".*") if path.is_file()]


def test_runs_in_a_row_leave_nothing(sandbox: Sandbox, full: bool) -> None:  # noqa: FBT001 - a fixture
    """Sequential runs leave no process, descriptor, thread, control group or temporary file behind."""
    sandbox.behave("nothing")
    before = threading.active_count()
    for number in range(1000 if full else 4):
        # The check for leftovers takes longer with each record, so it runs only now and then.
        ran = sandbox.behave("args", str(number), alone=number % 50 == 0)
        assert (ran.outcome, ran.stdout) == ("ok", f"{number}\0".encode()), ran.reason
        assert ran.result.phases["run"].start == usual_start()
    assert left_behind(sandbox.state) == []
    assert threading.active_count() == before
    assert unfinished_files(sandbox.state) == []


def test_runs_at_once_leave_nothing(sandbox: Sandbox, threads: ThreadPoolExecutor, full: bool) -> None:  # noqa: FBT001
    """Four parallel runs in one process each get their own output and leave nothing behind."""
    sandbox.behave("nothing")
    jobs = [threads.submit(sandbox.behave, "args", str(number), alone=False) for number in range(200 if full else 4)]
    for number, job in enumerate(jobs):
        ran = job.result(300)
        assert (ran.outcome, ran.stdout) == ("ok", f"{number}\0".encode()), ran.reason
    assert left_behind(sandbox.state) == []
    assert unfinished_files(sandbox.state) == []
