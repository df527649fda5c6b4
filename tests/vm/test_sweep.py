"""Sweep and kill with real virtual machines: dead runners' machines are reaped, and live ones stay."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from tests.command import X07
from tests.vm.conftest import left_behind, marked, owners

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("image")]
LONG = "import time; print('up', flush=True); time.sleep(600)"
WAIT_S = 120


@contextlib.contextmanager
def running() -> Iterator[subprocess.Popen[bytes]]:
    """Start a run, and yield its runner once the program has printed a line."""
    argv = [*X07, "run", "--no-pool", "--timeout", "500", "--toolchain", "python", "-c", LONG]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as runner:
        try:
            assert runner.stdout is not None
            assert runner.stdout.readline() == b"up\n"
            yield runner
        finally:
            runner.kill()


def document(*words: str) -> dict[str, Any]:
    """Run a command and return its JSON document."""
    done = subprocess.run([*X07, *words], stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=WAIT_S)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_sweep_leaves_nothing_of_a_killed_runners_machine(state: Path) -> None:
    """One sweep after SIGKILL of a runner leaves no process or control group, and a live run stays."""
    with running() as live:
        before = {str(owner["instance"]) for owner in owners(state)}
        with running() as dead:
            dead.kill()
            dead.wait()
            report = document("sweep", "--json")
        (job,) = report["removed"]
        assert (job["kind"], job["why"]) == ("job", "the x07 process that started it is dead")
        assert (state / job["id"] / "reaped").read_bytes() == b"reaped\n"
        gone = {str(owner["instance"]) for owner in owners(state)} - before
        assert not [pid for mark in gone for pid in marked(mark)]
        assert live.poll() is None
        assert any(marked(mark) for mark in before)
        live.send_signal(signal.SIGTERM)
        live.wait(WAIT_S)
    assert left_behind(state) == []
