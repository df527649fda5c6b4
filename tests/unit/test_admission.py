"""Admission: how many run at once, who waits, and that nothing keeps a slot."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from x07_sandbox.errors import Cancelled, HostError, RefusedError, UsageError
from x07_sandbox.host import settings
from x07_sandbox.host.locks import file_lock
from x07_sandbox.host.paths import cache_folder
from x07_sandbox.host.processes import children_of
from x07_sandbox.jobs.admission import admitted, max_running, warm_slots


@pytest.fixture(autouse=True)
def one_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue of the test's own, in front of one slot."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("X07_VM_MAX_RUNNING", "1")


@pytest.fixture
def never() -> Iterator[int]:
    """A request to cancel that never comes."""
    fd = os.eventfd(0)
    yield fd
    os.close(fd)


HOLDER = """
import os, sys, time
from x07_sandbox.jobs import admission
from x07_sandbox.jobs.admission import admitted
admission._SAY_AFTER_S = 600  # before that nobody looks whether the first of the queue is stopped
never = os.eventfd(0)
print("queued", flush=True)
with admitted(cancel_fd=never, timeout_s=60):
    print(sys.argv[1], flush=True)
    sys.stdin.read(1)
"""


class Holder:
    """Another process that waits for a slot and keeps it until it is told or killed."""

    def __init__(self, name: str) -> None:
        argv = [sys.executable, "-c", HOLDER, name]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdin is not None
        self.out, self.into = self.process.stdout, self.process.stdin
        assert self.out.readline() == "queued\n"

    def has_it(self) -> str:
        """Wait until it has a slot; its name."""
        return self.out.readline().strip()

    def wait_queued(self) -> None:
        """Wait until it stands in the queue: its flock(1) sleeps in the one call that it makes."""
        deadline = time.monotonic() + 60
        while not any(sleeps_in_flock(child) for child in children_of(self.process.pid)):
            assert time.monotonic() < deadline
            time.sleep(0.01)  # no event tells of it

    def end(self) -> None:
        """Let it go."""
        self.process.kill()
        self.process.wait()
        self.out.close()
        self.into.close()


def sleeps_in_flock(pid: int) -> bool:
    """Whether that process is flock(1), and waits."""
    try:
        name, _, rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return name.endswith("(flock") and rest.split()[0] == "S"


def test_a_free_slot_is_taken_at_once(never: int) -> None:
    """With a free slot nobody waits, and it is free again afterwards."""
    for _ in range(3):
        with admitted(cancel_fd=never, timeout_s=60) as waited:
            assert waited < 30


def test_a_killed_process_keeps_no_slot(never: int) -> None:
    """While another process has the only slot the wait ends at its time; killed, that process has none."""
    holder = Holder("first")
    try:
        assert holder.has_it() == "first"
        with pytest.raises(RefusedError, match="no machine was free in time"), admitted(cancel_fd=never, timeout_s=0.2):
            pass
        holder.process.send_signal(signal.SIGKILL)
        with admitted(cancel_fd=never, timeout_s=60):
            pass
    finally:
        holder.end()


def test_a_request_to_cancel_ends_the_wait(never: int) -> None:
    """Who waits can be cancelled, and then stands in nobody's way."""
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
    """Processes get a free slot in the order in which they came, and newcomers do not overtake them."""
    holders: list[Holder] = []
    try:
        # We are the first of the queue too, so that all of them sleep until there is a slot.
        with admitted(cancel_fd=never, timeout_s=60), file_lock(cache_folder("slots") / "turn"):
            for number in range(4):
                holders.append(Holder(str(number)))
                holders[-1].wait_queued()
        for number, holder in enumerate(holders):
            assert holder.has_it() == str(number)
            holder.into.write("x")
            holder.into.flush()
    finally:
        for holder in holders:
            holder.end()


def test_as_many_run_as_there_are_slots(never: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable is the number of those that run at once."""
    monkeypatch.setenv("X07_VM_MAX_RUNNING", "3")
    inside = [admitted(cancel_fd=never, timeout_s=0.2) for _ in range(4)]
    for one in inside[:3]:
        one.__enter__()
    with pytest.raises(RefusedError):
        inside[3].__enter__()
    for one in inside[:3]:
        one.__exit__(None, None, None)


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "99999"])
def test_a_wrong_number_is_an_error(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """A value that is no number of machines is refused, naming the variable."""
    monkeypatch.setenv("X07_VM_MAX_RUNNING", value)
    with pytest.raises(UsageError, match="X07_VM_MAX_RUNNING"):
        max_running()


def test_without_the_variable_cores_and_memory_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least one, and no more than there are processors for us."""
    monkeypatch.delenv("X07_VM_MAX_RUNNING")
    assert 1 <= max_running() <= len(os.sched_getaffinity(0))


def what_there_is() -> list[set[str]]:
    """The descriptors, threads and children of this process."""
    own = Path("/proc/self")
    children = set((own / f"task/{os.getpid()}/children").read_text().split())
    return [{entry.name for entry in (own / what).iterdir()} for what in ("fd", "task")] + [children]


def test_pools_share_the_memory_for_machines_that_wait() -> None:
    """What the pools of all the user's processes keep warm is no more than memory holds, and ends with each of them."""
    keeper = "import sys\nfrom x07_sandbox.jobs.admission import warm_slots\n"
    keeper += "with warm_slots(2, 5):\n    print('kept', flush=True)\n    sys.stdin.read(1)\n"
    with subprocess.Popen([sys.executable, "-c", keeper], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"kept\n"
        with pytest.raises(HostError, match="other pools leave 3 of them"), warm_slots(4, 5):
            pass
        with warm_slots(3, 5), pytest.raises(HostError, match="leave 0 of them"), warm_slots(1, 5):
            pass
        other.kill()
    with warm_slots(5, 5):
        pass


def test_a_wait_that_is_over_leaves_nothing(never: int) -> None:
    """Of a wait that ended while others are still queued there is no thread, no child and no descriptor left."""
    ahead = Holder("first")
    try:
        assert ahead.has_it() == "first"
        second = Holder("second")
        time.sleep(0.3)  # until it has the turn, of which nothing tells
        try:
            before = what_there_is()
            with pytest.raises(RefusedError), admitted(cancel_fd=never, timeout_s=0.2):
                pass
            assert what_there_is() == before
        finally:
            second.end()
    finally:
        ahead.end()


def test_a_wait_as_long_as_may_be_is_not_told_to_be_longer(never: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has waited in vain is told to wait longer only where that is possible."""

    def wait_in_vain() -> None:
        with admitted(cancel_fd=never, timeout_s=0.2):
            pass

    ahead = Holder("first")
    try:
        assert ahead.has_it() == "first"
        with pytest.raises(
            RefusedError, match="Set a longer --queue-timeout of x07 run, or a larger X07_VM_MAX_RUNNING"
        ):
            wait_in_vain()
        monkeypatch.setattr(settings, "QUEUE_S", 0.2)
        with pytest.raises(RefusedError, match="Set a larger X07_VM_MAX_RUNNING"):
            wait_in_vain()
    finally:
        ahead.end()


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), OSError(errno.EMFILE, "Too many open files")])
def test_a_wait_that_could_not_begin_leaves_nothing(
    never: int, monkeypatch: pytest.MonkeyPatch, problem: BaseException
) -> None:
    """Interrupted, or without a descriptor to wait with, a run leaves neither a lock in the queue nor a child."""
    holder = Holder("first")
    try:
        assert holder.has_it() == "first"
        before = what_there_is()

        def refuse(_pid: int) -> int:
            raise problem

        with monkeypatch.context() as patch:
            patch.setattr(os, "pidfd_open", refuse)
            with pytest.raises((KeyboardInterrupt, HostError)), admitted(cancel_fd=never, timeout_s=5):
                pass
        assert what_there_is() == before
    finally:
        holder.end()
    with admitted(cancel_fd=never, timeout_s=60) as waited:
        assert waited < 30
