"""`x07 prune` beside a real run: the run loses nothing, and once it is over and old its records go."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.vm.conftest import Sandbox, owners, wait_done
from x07_sandbox.host.clocks import unix_ms
from x07_sandbox.housekeeping.prune import prune

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path

    from x07_sandbox.housekeeping.pruner import PruneReport

pytestmark = [pytest.mark.vm, pytest.mark.timeout(180)]

SLEEP = "import sys, time\nsys.stdin.read()\nprint('awake')\n"


def make_old(place: Path) -> None:
    """Let all of it look as if it were 400 days old."""
    then = unix_ms() / 1000 - 400 * 86_400
    for folder, _, names in os.walk(place, topdown=False):
        for path in [*(os.path.join(folder, name) for name in names), folder]:  # noqa: PTH118 - as walk has them
            os.utime(path, (then, then))


def swept() -> PruneReport:
    """What goes of the records."""
    return prune(["runs"], progress=lambda _text: None, dry_run=False)


def test_a_run_under_way_keeps_its_records(
    sandbox: Sandbox, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the jobs of a run, whose clock stood in 1970 and whose files look old, prune removes nothing of it."""
    sandbox.run_text("sleep.py", SLEEP)  # saved machines, which are jobs too, are made by whoever needs them first
    make_old(sandbox.state.parent)
    swept()
    monkeypatch.setattr("x07_sandbox.jobs.record.unix_ms", lambda: 1_000)
    ours, theirs = os.pipe()
    with os.fdopen(ours, "rb") as given, os.fdopen(theirs, "wb") as ending:
        going = threads.submit(sandbox.run_text, "sleep.py", SLEEP, stdin=given.fileno())
        wait_done(sandbox.state, 60)  # the build is over, the program is about to read
        make_old(sandbox.state.parent)
        assert swept().removed == ()
        ending.close()
        ran = going.result(timeout=60)
    assert (ran.outcome, ran.stdout) == ("ok", b"awake\n"), ran.reason
    assert len(owners(sandbox.state)) == 2
    make_old(sandbox.state.parent)
    assert sorted(removed.kind for removed in swept().removed) == ["job", "job", "run"]
    assert owners(sandbox.state) == []
