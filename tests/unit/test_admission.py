"""Admission: how many jobs run at once, who waits, and that no slot leaks."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from x07_sandbox.errors import Cancelled, HostError, RefusedError, UsageError
from x07_sandbox.host.linux import children_of
from x07_sandbox.host.locks import file_lock
from x07_sandbox.host.paths import cache_folder
from x07_sandbox.records.admission import RUNS, SANDBOXES, admitted, max_running, warm_slots


@pytest.fixture(autouse=True)
def one_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue of the test's own with one slot."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("X07_VM_MAX_RUNNING", "1")


@pytest.fixture
def never() -> Iterator[int]:
    """A cancellation descriptor that never becomes ready."""
    fd = os.eventfd(0)
    yield fd
    os.close(fd)


HOLDER = """
import os, sys, time
from x07_sandbox.records import admission
from x07_sandbox.records.admission import admitted
admission._SAY_AFTER_S = 600  # no check for a stopped process at the head of the queue before that
never = os.eventfd(0)
print("queued", flush=True)
with admitted(cancel_fd=never, timeout_s=60):
    print(sys.argv[1], flush=True)
    sys.stdin.read(1)
"""


class Holder:
    """Another process that waits for a slot and holds it until it is released or killed."""

    def __init__(self, name: str) -> None:
        argv = [sys.executable, "-c", HOLDER, name]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdin is not None
        self.out, self.into = self.process.stdout, self.process.stdin
        assert self.out.readline() == "queued\n"

    def wait_for_slot(self) -> str:
        """Wait until the process has a slot; return its name."""
        return self.out.readline().strip()

    def wait_queued(self) -> None:
        """Wait until the process is queued: its flock(1) child sleeps in the system call."""
        deadline = time.monotonic() + 60
        while not any(sleeps_in_flock(child) for child in children_of(self.process.pid)):
            assert time.monotonic() < deadline
            time.sleep(0.01)  # there is no event for it

    def wait_first(self) -> None:
        """Wait until the process is the first in the queue: it has the lock that its flock(1) child waited for."""
        deadline = time.monotonic() + 60
        while free_turn() or any(sleeps_in_flock(child) for child in children_of(self.process.pid)):
            assert time.monotonic() < deadline
            time.sleep(0.01)  # there is no event for it

    def end(self) -> None:
        """Kill the process and close its pipes."""
        self.process.kill()
        self.process.wait()
        self.out.close()
        self.into.close()


def free_turn() -> bool:
    """Return whether no process is or becomes the first in the queue."""
    with (cache_folder("slots") / "turn").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def sleeps_in_flock(pid: int) -> bool:
    """Return whether *pid* is a sleeping flock(1)."""
    try:
        name, _, rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return name.endswith("(flock") and rest.split()[0] == "S"


def test_a_killed_process_keeps_no_slot(never: int) -> None:
    """A wait for a slot times out while another process holds it, and a killed process frees its slot."""
    holder = Holder("first")
    try:
        assert holder.wait_for_slot() == "first"
        with pytest.raises(RefusedError, match="no slot was free in time"), admitted(cancel_fd=never, timeout_s=0.2):
            pass
        holder.process.send_signal(signal.SIGKILL)
        with admitted(cancel_fd=never, timeout_s=60):
            pass
    finally:
        holder.end()


def test_a_cancelled_waiter_leaves_the_queue(never: int) -> None:
    """A cancelled waiter leaves the queue."""
    with admitted(cancel_fd=never, timeout_s=1):
        cancel = os.eventfd(1)
        try:
            with pytest.raises(Cancelled), admitted(cancel_fd=cancel, timeout_s=60):
                pass
        finally:
            os.close(cancel)
    with admitted(cancel_fd=never, timeout_s=5):
        pass


def test_first_come_first_served(never: int) -> None:
    """Processes get free slots in the order in which they queued."""
    holders: list[Holder] = []
    try:
        # This process is first in the queue, so all of them sleep until there is a slot.
        with admitted(cancel_fd=never, timeout_s=60), file_lock(cache_folder("slots") / "turn"):
            for number in range(4):
                holders.append(Holder(str(number)))
                holders[-1].wait_queued()
        for number, holder in enumerate(holders):
            assert holder.wait_for_slot() == str(number)
            holder.into.write("x")
            holder.into.flush()
    finally:
        for holder in holders:
            holder.end()


def test_as_many_run_as_there_are_slots(never: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """X07_VM_MAX_RUNNING sets how many jobs run at once."""
    monkeypatch.setenv("X07_VM_MAX_RUNNING", "3")
    inside = [admitted(cancel_fd=never, timeout_s=0.2) for _ in range(4)]
    for one in inside[:3]:
        one.__enter__()
    with pytest.raises(RefusedError):
        inside[3].__enter__()
    for one in inside[:3]:
        one.__exit__(None, None, None)


def test_sandboxes_have_slots_of_their_own(never: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """X07_VM_MAX_SANDBOXES sets how many sandboxes are open at once, whatever the number of runs."""
    monkeypatch.setenv("X07_VM_MAX_SANDBOXES", "1")
    said: list[str] = []
    with admitted(cancel_fd=never, timeout_s=60, slots=SANDBOXES), admitted(cancel_fd=never, timeout_s=60, slots=RUNS):
        waiting = admitted(cancel_fd=never, timeout_s=1.5, slots=SANDBOXES, progress=said.append)
        with pytest.raises(RefusedError, match=r"no slot was free in time.*larger X07_VM_MAX_SANDBOXES"):
            waiting.__enter__()
    how_many = "1 sandboxes are open, as many as may be"
    assert said == [f"waiting until one ends: {how_many} (set by X07_VM_MAX_SANDBOXES, or by memory)"]


def test_a_free_slot_is_found_without_a_wait(never: int) -> None:
    """With a timeout of 0, a free slot is taken although another process looks for one at that moment."""
    turn = contextlib.ExitStack()
    turn.enter_context(file_lock(cache_folder("slots") / "turn"))
    releasing = threading.Timer(0.1, turn.close)
    releasing.start()
    with admitted(cancel_fd=never, timeout_s=0), pytest.raises(RefusedError, match="within 0 s"):
        admitted(cancel_fd=never, timeout_s=0).__enter__()
    releasing.join()


def test_a_waiter_says_that_sigchld_is_ignored(never: int) -> None:
    """A process that ignores SIGCHLD gets an error that says so, also if it would have to wait for a slot."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with (
            file_lock(cache_folder("slots") / "turn"),
            pytest.raises(HostError, match="SIGCHLD is ignored"),
            admitted(cancel_fd=never, timeout_s=60),
        ):
            pass
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "99999"])
def test_a_wrong_number_is_an_error(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """An invalid X07_VM_MAX_RUNNING is a usage error that names the variable; by default cores and memory decide."""
    monkeypatch.setenv("X07_VM_MAX_RUNNING", value)
    with pytest.raises(UsageError, match="X07_VM_MAX_RUNNING"):
        max_running()
    monkeypatch.delenv("X07_VM_MAX_RUNNING")
    assert 1 <= max_running() <= len(os.sched_getaffinity(0))


def open_resources() -> list[set[str]]:
    """Return the descriptors, threads and children of this process."""
    own = Path("/proc/self")
    children = set((own / f"task/{os.getpid()}/children").read_text().split())
    return [{entry.name for entry in (own / what).iterdir()} for what in ("fd", "task")] + [children]


def test_pools_share_the_memory_for_machines_that_wait() -> None:
    """All pools of a user together keep no more warm VMs than memory allows, and a pool's share ends with it."""
    keeper = "import sys\nfrom x07_sandbox.records.admission import warm_slots\n"
    keeper += "with warm_slots(2, 5):\n    print('kept', flush=True)\n    sys.stdin.read(1)\n"
    with subprocess.Popen([sys.executable, "-c", keeper], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"kept\n"
        with pytest.raises(HostError, match="other pools leave only 3"), warm_slots(4, 5):
            pass
        with warm_slots(3, 5), pytest.raises(HostError, match="leave only 0"), warm_slots(1, 5):
            pass
        other.kill()
    with warm_slots(5, 5):
        pass


def test_a_wait_that_is_over_leaves_nothing(never: int) -> None:
    """A timed-out wait leaves no thread, child or descriptor."""
    ahead = Holder("first")
    try:
        assert ahead.wait_for_slot() == "first"
        second = Holder("second")
        second.wait_first()
        try:
            before = open_resources()
            with pytest.raises(RefusedError), admitted(cancel_fd=never, timeout_s=0.2):
                pass
            assert open_resources() == before
        finally:
            second.end()
    finally:
        ahead.end()
