"""Many runs in one process, in a row and at once: nothing grows, and nothing is left but records."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest

from tests.vm.conftest import Sandbox, left_behind

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path

pytestmark = [pytest.mark.vm, pytest.mark.timeout(3600)]


def held() -> tuple[int, int]:
    """Descriptors and threads of this process."""
    return len(os.listdir("/proc/self/fd")), threading.active_count()  # noqa: PTH208 - numbers


def temporary(state: Path) -> list[Path]:
    """Files with a leading dot below the records: such as were never finished."""
    return [path for path in state.rglob(".*") if path.is_file()]


def test_runs_in_a_row_leave_nothing(sandbox: Sandbox, full: bool) -> None:  # noqa: FBT001 - a fixture
    """Run after run leaves no process, descriptor, thread, control group or half-written file behind."""
    sandbox.behave("nothing")
    before = held()
    for number in range(1000 if full else 8):
        # Looking for what is left takes longer with each record: so not after each of many.
        ran = sandbox.behave("args", str(number), alone=number % 50 == 0)
        assert (ran.outcome, ran.stdout) == ("ok", f"{number}\0".encode()), ran.reason
        assert ran.result.phases["run"].start == "clone"
    assert left_behind(sandbox.state) == []
    assert held() == before
    assert temporary(sandbox.state) == []


def test_runs_at_once_leave_nothing(sandbox: Sandbox, threads: ThreadPoolExecutor, full: bool) -> None:  # noqa: FBT001
    """Four runs at a time, of one process, get their own output each, and leave nothing behind either."""
    sandbox.behave("nothing")
    before = held()[0]
    jobs = [threads.submit(sandbox.behave, "args", str(number), alone=False) for number in range(200 if full else 6)]
    for number, job in enumerate(jobs):
        ran = job.result(300)
        assert (ran.outcome, ran.stdout) == ("ok", f"{number}\0".encode()), ran.reason
    assert left_behind(sandbox.state) == []
    assert held()[0] == before
    assert temporary(sandbox.state) == []
