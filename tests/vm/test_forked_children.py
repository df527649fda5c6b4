"""Children forked from a process that runs programs: they hold none of its locks, leases or machines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.command import X07
from tests.vm.conftest import copy_cache, left_behind, usual_start
from x07_sandbox import run_program
from x07_sandbox.host.locks import file_lock
from x07_sandbox.host.processes import close_on_fork
from x07_sandbox.records.admission import admitted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from x07_sandbox.host.processes import Identity
    from x07_sandbox.images.store import Image

pytestmark = pytest.mark.vm

# Runs a program in a thread and forks a child that sleeps; then it is killed from outside.
FORKING = """
import os, sys, threading, time
from x07_sandbox import run_program
started = threading.Event()
def run():
    run_program(source="echo on; sleep 100", toolchain="shell", on_output=lambda *_: started.set())
threading.Thread(target=run, daemon=True).start()
assert started.wait(60)
child = os.fork()
if child == 0:
    time.sleep(100)
    os._exit(0)
print(child, flush=True)
time.sleep(100)
"""


@pytest.fixture
def _own_cache(tmp_path: Path, image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a cache with its own queue and pool."""
    del image
    place = tmp_path / "cache"
    copy_cache(place)
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(place))


@pytest.fixture
def sleeping() -> Iterator[list[int]]:
    """Sleeping children of a test, killed at its end."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def forked(pids: list[int]) -> None:
    """Fork a child that sleeps."""
    pid = os.fork()
    if pid == 0:
        time.sleep(100)
        os._exit(0)
    pids.append(pid)


def reap(pids: list[int]) -> None:
    """Reap such children of this process."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    pids.clear()


def test_a_forked_child_does_not_hold_a_lock(tmp_path: Path) -> None:
    """A released lock is free even if a child was forked while it was held."""
    pids: list[int] = []
    with file_lock(tmp_path / "lock"):
        forked(pids)
    with file_lock(tmp_path / "lock", on_wait=lambda: pytest.fail("it is still locked")):
        pass
    reap(pids)


def test_withheld_descriptors_are_dev_null_in_a_child(tmp_path: Path) -> None:
    """In a forked child, descriptors that it must not hold lead to /dev/null and keep their numbers."""
    path = tmp_path / "file"
    fd = close_on_fork.add(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    pid = os.fork()
    if pid == 0:
        same = os.fstat(fd).st_rdev == Path("/dev/null").stat().st_rdev
        os._exit(0 if same else 1)
    assert os.waitpid(pid, 0)[1] == 0
    os.write(fd, b"mine")
    close_on_fork.discard(fd)
    os.close(fd)
    assert path.read_bytes() == b"mine"


def test_no_child_is_forked_while_a_process_is_started() -> None:
    """A fork waits while another thread starts a process, which would otherwise wait for the child's end."""
    pids: list[int] = []
    with close_on_fork.no_fork():
        forking = threading.Thread(target=forked, args=(pids,))
        forking.start()
        forking.join(0.2)
        assert forking.is_alive()
    forking.join()
    reap(pids)


@pytest.mark.usefixtures("state")
def test_a_forked_child_does_not_delay_a_starting_machine(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child forked while a machine waits at its gate does not delay it: it starts as a clone."""
    from x07_sandbox.backends.qemu.instance import QemuInstance

    run_program(source="true", toolchain="shell", image=image.digest)  # so that there is a saved machine
    pids: list[int] = []
    record_owner = QemuInstance.record_owner

    def forking(instance: QemuInstance, runner: Identity) -> None:
        forked(pids)
        record_owner(instance, runner)

    monkeypatch.setattr(QemuInstance, "record_owner", forking)
    ran = run_program(source="true", toolchain="shell", image=image.digest)
    starts = {phase.start for phase in ran.phases.values()}
    reap(pids)
    assert (ran.outcome, starts) == ("ok", {usual_start()}), ran.warnings


@pytest.mark.usefixtures("state")
def test_a_forked_child_does_not_delay_a_streaming_call(image: Image) -> None:
    """A call that streams output returns when the program ends, even if a child was forked meanwhile."""
    pids: list[int] = []
    run_program(source="echo on", toolchain="shell", image=image.digest, on_output=lambda *_: forked(pids))
    assert os.waitpid(pids[0], os.WNOHANG) == (0, 0)  # the child is alive
    reap(pids)


@pytest.mark.usefixtures("_own_cache")
def test_a_killed_runner_frees_its_slot_despite_forked_children(
    state: Path, sleeping: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed runner whose forked child is alive leaves no machine and no occupied slot."""
    monkeypatch.setenv("X07_VM_MAX_RUNNING", "1")
    with subprocess.Popen([sys.executable, "-c", FORKING], stdout=subprocess.PIPE, text=True) as runner:
        assert runner.stdout is not None
        sleeping.append(int(runner.stdout.readline()))
        runner.kill()
    cancel = os.eventfd(0)
    with admitted(cancel_fd=cancel, timeout_s=60):  # the child lives longer
        pass
    os.close(cancel)
    wait_gone(state)


@pytest.mark.usefixtures("_own_cache")
def test_a_pool_ends_the_machine_of_a_killed_process(state: Path, sleeping: list[int]) -> None:
    """If a process that claimed a pool machine is killed, the pool ends the machine despite its forked children."""
    subprocess.run([*X07, "pool", "start", "--size", "1"], check=True, capture_output=True)
    try:
        with subprocess.Popen([sys.executable, "-c", FORKING], stdout=subprocess.PIPE, text=True) as runner:
            assert runner.stdout is not None
            sleeping.append(int(runner.stdout.readline()))
            runner.kill()
        deadline = time.monotonic() + 60  # the child lives longer
        while True:
            shown = subprocess.run([*X07, "pool", "status", "--json"], check=False, capture_output=True)
            pool = json.loads(shown.stdout)["pool"] if shown.returncode == 0 else None  # a busy one answers later
            if pool is not None and pool["running"] == 0:
                break
            assert time.monotonic() < deadline, (pool, shown.stderr)
            time.sleep(0.2)  # another process's state: there is nothing to wait on
        assert pool["claimed"] == 1
    finally:
        subprocess.run([*X07, "pool", "stop"], check=True, capture_output=True)
    wait_gone(state)


def wait_gone(state: Path) -> None:
    """Wait until no process of a job below *state* is left; its killed runner may have left the record unfinished."""
    deadline = time.monotonic() + 60
    while alive := [what for what in left_behind(state) if "done" not in what and "control group" not in what]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)  # as above
