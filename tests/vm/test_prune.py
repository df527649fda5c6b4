"""`x07 prune` beside a real run: it removes nothing of the run until the run is over and old."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.vm.conftest import Sandbox, owners, wait_done
from x07_sandbox.host.waiting import unix_ms
from x07_sandbox.library.cleanup import prune

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    from x07_sandbox.records.pruning import PruneReport

pytestmark = pytest.mark.vm

SLEEP = "import sys, time\nsys.stdin.read()\nprint('awake')\n"


def make_old(place: Path) -> None:
    """Set all file times below *place* to 400 days ago."""
    then = unix_ms() / 1000 - 400 * 86_400
    for folder, _, names in os.walk(place, topdown=False):
        for path in [*(os.path.join(folder, name) for name in names), folder]:  # noqa: PTH118 - names from os.walk
            os.utime(path, (then, then))


def prune_runs() -> PruneReport:
    """Prune the run records."""
    return prune(["runs"], progress=lambda _text: None, dry_run=False)


@pytest.mark.usefixtures("under_os")
def test_prune_keeps_the_records_of_an_active_run(
    sandbox: Sandbox, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`x07 prune` removes no record of an active run, even if the clock and the file times look old."""
    monkeypatch.setattr("x07_sandbox.records.runs.unix_ms", lambda: 1_000)
    ours, theirs = os.pipe()
    with os.fdopen(ours, "rb") as stdin_read, os.fdopen(theirs, "wb") as stdin_write:
        running = threads.submit(sandbox.run_text, "sleep.py", SLEEP, stdin=stdin_read.fileno())
        wait_done(sandbox.state, 60)  # the build is over, and the program waits for input
        make_old(sandbox.state.parent)
        assert prune_runs().removed == ()
        stdin_write.close()
        ran = running.result(timeout=60)
    assert (ran.outcome, ran.stdout) == ("ok", b"awake\n"), ran.reason
    assert len(owners(sandbox.state)) == 2
    make_old(sandbox.state.parent)
    assert sorted(removed.kind for removed in prune_runs().removed) == ["job", "job", "run"]
    assert owners(sandbox.state) == []


def test_prune_keeps_the_saved_vm_of_an_active_run(
    sandbox: Sandbox, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`x07 prune` removes no saved VM that a live VM uses, even if saved VMs take too much space."""
    (tmp_path / "x07").mkdir()
    (tmp_path / "x07" / "sandbox.toml").write_text("[disk]\nsaved_vms_mib = 1\n")
    (stdin_read, stdin_write), (stdout_read, stdout_write) = os.pipe(), os.pipe()
    with os.fdopen(stdin_read), os.fdopen(stdin_write, "wb") as stdin, os.fdopen(stdout_write):
        run = {"stdin": stdin_read, "live_stdout": stdout_write}
        running = threads.submit(sandbox.run_text, "wait.py", f"print('up', flush=True)\n{SLEEP}", **run)
        with os.fdopen(stdout_read, "rb") as stdout:
            assert stdout.readline() == b"up\n"
            monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))  # only now, so that the run itself removes none
            open_files = {str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}
            used = {path for path in open_files if re.fullmatch(r".*/templates/[0-9a-f]{64}", path)}
            report = prune(["cache"], progress=lambda _text: None, dry_run=True)
            assert len(used) == 1
            assert not used & {removed.path for removed in report.removed}
            stdin.close()
            assert running.result(timeout=60).outcome == "ok"
