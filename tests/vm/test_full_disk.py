"""A full disk below the state folder: a run is refused, or its program gets an error; nothing hangs."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import need
from tests.vm.conftest import Artifacts, Sandbox

pytestmark = pytest.mark.vm

SmallDisk = Callable[[str], Sandbox]


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, artifacts: Artifacts) -> Iterator[SmallDisk]:
    """Runs whose records and scratch disks lie on a file system of the given size."""
    need(os.geteuid() == 0, "only root can mount a small file system", installable=False)
    with contextlib.ExitStack() as stack:

        def make(size: str) -> Sandbox:
            disk = tmp_path / "disk"
            disk.mkdir()
            subprocess.run(["/usr/bin/mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "none", disk], check=True)
            stack.callback(lambda: subprocess.run(["/usr/bin/umount", disk], check=True))
            monkeypatch.setenv("X07_VM_STATE_DIR", str(disk / "jobs"))
            return Sandbox(disk / "jobs", tmp_path, artifacts)

        yield make


@pytest.mark.parametrize("size", ["4k", "32k"])
def test_a_job_that_does_not_fit_on_the_disk_is_refused(small_disk: SmallDisk, size: str) -> None:
    """If records and an empty scratch disk do not fit, nothing runs, and the reason says what to do."""
    ran = small_disk(size).behave("nothing")
    assert (ran.outcome, ran.result.x07_exit_code, ran.result.fault) == ("refused", 125, "host")
    assert "No space left" in ran.reason
    assert "X07_VM_STATE_DIR" in ran.reason


@pytest.mark.parametrize("files", [3, 6, 8, 10])
def test_the_advice_for_a_full_disk_is_to_free_space(small_disk: SmallDisk, files: int) -> None:
    """Whichever file of a job does not fit, the only advice is to free space."""
    ran = small_disk(f"1m,nr_inodes={files}").behave("nothing")
    assert (ran.outcome, ran.result.fault) == ("refused", "host")
    assert "No space left on device. Free disk space, or set X07_VM_STATE_DIR" in ran.reason


def test_a_program_that_fills_the_disk_gets_an_error(small_disk: SmallDisk) -> None:
    """A program that fills the host's disk gets an error, ends by itself, and leaves no remains."""
    ran = small_disk("24m").run_text(
        "fill.py",
        "import os\n"
        "fd = os.open('big', os.O_WRONLY | os.O_CREAT)\n"
        "try:\n"
        "    for _ in range(100):\n"
        "        os.write(fd, bytes(1 << 20))\n"
        "        os.fsync(fd)\n"
        "except OSError as exc:\n"
        "    raise SystemExit(3)\n",
    )
    assert (ran.outcome, ran.result.exit_code) == ("failed", 3), ran.reason


def test_output_that_cannot_be_kept_ends_the_run(small_disk: SmallDisk) -> None:
    """If the program's output does not fit on the host's disk, the run ends as `backend-error` and says why."""
    ran = small_disk("8m").behave("flood", "1")
    assert (ran.outcome, ran.result.x07_exit_code) == ("backend-error", 125), ran.reason
    assert "cannot store the program's stdout: No space left on device" in ran.reason
