"""The reaper of container engines as a real process, with a stand-in for the call that removes a container."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from x07_sandbox.backends.container import reaper

if TYPE_CHECKING:
    from pathlib import Path


def start(folder: Path, seconds: float, status: int = 0) -> tuple[subprocess.Popen[bytes], int]:
    """Start a reaper and return it with the runner's end of its pipe. status: exit code of the stand-in."""
    removing = folder / "remove"
    removing.write_text(f"#!/bin/sh\necho $1 >> {folder}/removed\nexit {status}\n", encoding="ascii")
    removing.chmod(0o755)
    runner_r, runner_w = os.pipe()
    until = time.clock_gettime(time.CLOCK_BOOTTIME) + seconds
    argv = [sys.executable, "-I", "-S", reaper.__file__, str(folder), str(until), str(runner_r), str(removing), "one"]
    process = subprocess.Popen(argv, pass_fds=(runner_r,))
    os.close(runner_r)
    return process, runner_w


def test_the_container_of_a_dead_runner_is_removed(tmp_path: Path) -> None:
    """The container is removed as soon as its runner ends, and the record says `reaped`."""
    process, runner_w = start(tmp_path, 600)
    os.close(runner_w)
    assert process.wait(60) == 0
    assert (tmp_path / "removed").read_text(encoding="ascii") == "one\n"
    assert (tmp_path / "reaped").read_text(encoding="ascii") == "reaped\n"


def test_a_removed_container_is_not_removed_twice(tmp_path: Path) -> None:
    """A container that its runner reports as removed is not removed twice."""
    process, runner_w = start(tmp_path, 600)
    os.write(runner_w, b"g")
    os.close(runner_w)
    assert process.wait(60) == 0
    assert not (tmp_path / "removed").exists()
    assert not (tmp_path / "reaped").exists()


def test_a_container_is_removed_at_the_deadline(tmp_path: Path) -> None:
    """At the deadline the container is removed although its runner still exists."""
    process, runner_w = start(tmp_path, 0.2)
    assert process.wait(60) == 0
    os.close(runner_w)
    assert (tmp_path / "reaped").exists()


@pytest.mark.slow
def test_a_failed_removal_is_not_recorded_as_reaped(tmp_path: Path) -> None:
    """A failing removal is tried five times, and `reaped` is not written."""
    process, runner_w = start(tmp_path, 0.0, status=1)
    assert process.wait(60) == 0
    os.close(runner_w)
    assert (tmp_path / "removed").read_text(encoding="ascii") == "one\n" * 5
    assert not (tmp_path / "reaped").exists()
