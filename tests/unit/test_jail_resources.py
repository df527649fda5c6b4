"""What a running job has to itself: a uid, if root started it, and control groups, with real groups and processes."""

from __future__ import annotations

import fcntl
import grp
import os
import pwd
import secrets
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from x07_sandbox.jail.resources import COUNT, HostGroups, free_range, lease_uid, make_groups

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Need

LEASE = (
    "import sys\n"
    "from x07_sandbox.jail.resources import lease_uid\n"
    "with lease_uid() as (uid, fd):\n"
    "    print(uid, flush=True)\n"
    "    sys.stdin.read()\n"
)


@pytest.fixture
def as_root(need: Need) -> None:
    """Only root leases uids."""
    need(os.geteuid() == 0, "needs root", installable=False)


def in_use(uid: int) -> bool:
    """Return whether a job holds the lock of this uid."""
    fd = os.open(Path("/run/x07-sandbox/uids") / str(uid), os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def test_the_uid_range_is_unused() -> None:
    """The uids for jobs exist here, and no user, group or subordinate range of the host overlaps them."""
    first = free_range()
    uids = range(first, first + COUNT)
    assert 0 not in uids
    assert not [user.pw_name for user in pwd.getpwall() if user.pw_uid in uids]
    assert not [group.gr_name for group in grp.getgrall() if group.gr_gid in uids]
    for file in ("/etc/subuid", "/etc/subgid"):
        lines = Path(file).read_text(encoding="utf-8").split() if Path(file).exists() else []
        for _, start, count in (line.split(":") for line in lines):
            assert set(uids).isdisjoint(range(int(start), int(start) + int(count)))
    lines = Path("/proc/self/uid_map").read_text(encoding="ascii").splitlines()
    mapped = [range(int(start), int(start) + int(size)) for start, _, size in (line.split() for line in lines)]
    assert any(uids[0] in part and uids[-1] in part for part in mapped)


@pytest.mark.root
@pytest.mark.usefixtures("as_root")
def test_two_jobs_never_share_a_uid() -> None:
    """Jobs that run at the same time have different uids."""
    with lease_uid() as (one, _), lease_uid() as (two, _), lease_uid() as (three, _):
        assert len({one, two, three}) == 3
        assert {one, two, three} <= set(range(free_range(), free_range() + COUNT))
        assert in_use(one)


@pytest.mark.root
@pytest.mark.usefixtures("as_root")
def test_the_uid_of_a_killed_runner_is_free() -> None:
    """A killed runner releases its uid."""
    with subprocess.Popen([sys.executable, "-c", LEASE], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as runner:
        assert runner.stdout is not None
        uid = int(runner.stdout.readline())
        assert in_use(uid)
        runner.kill()
        runner.wait()
    assert not in_use(uid)


@pytest.mark.root
@pytest.mark.usefixtures("as_root")
def test_a_uid_stays_leased_while_its_job_lives() -> None:
    """A uid stays leased as long as any process of its job lives."""
    with lease_uid() as (uid, fd):
        child = subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, pass_fds=[fd])
    with child:
        assert in_use(uid)
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(60) == 0
    assert not in_use(uid)


# control groups

MEMORY = 64 * 1024 * 1024
TASKS = 7
VALUES = {"memory.max": MEMORY, "memory.limit_in_bytes": MEMORY, "pids.max": TASKS}


def made_groups() -> HostGroups:
    """Make the cgroups of a job, and wait for the thread that hastens the move into them."""
    made = make_groups(f"test-{secrets.token_hex(8)}", memory_bytes=MEMORY, tasks=TASKS)
    for thread in threading.enumerate():
        if thread.name == "x07-groups":
            thread.join()
    return made


@pytest.fixture
def groups(need: Need) -> Iterator[HostGroups]:
    """The cgroups of a job, if this host allows any."""
    made = made_groups()
    need(made.folders, "this host gives us no control groups", installable=False)
    try:
        yield made
    finally:
        deadline = time.monotonic() + 60
        while not made.remove():  # busy until all are reaped, orphans by another's init
            assert time.monotonic() < deadline


def test_declared_limits_are_set(groups: HostGroups) -> None:
    """Each declared limit is set in the kernel."""
    found = {
        path.name: int(path.read_text(encoding="ascii"))
        for folder in groups.folders
        for path in folder.iterdir()
        if path.name in VALUES
    }
    assert len(found) == len(groups.holds)
    assert found == {name: VALUES[name] for name in found}
    assert {name.partition(".")[0] for name in found} == set(groups.holds)
    assert all(name in groups.describe() for name in groups.holds)


def test_a_pooled_vm_gets_a_new_memory_limit(groups: HostGroups, need: Need) -> None:
    """A pooled VM gets the memory limit of the job that claims it."""
    need("memory" in groups.holds, "this host gives us no memory group", installable=False)
    for limit in (2 * MEMORY, MEMORY // 2):
        groups.limit_memory(limit)
        files = [folder / name for folder in groups.folders for name in VALUES if name.startswith("memory")]
        assert {int(file.read_text(encoding="ascii")) for file in files if file.exists()} == {limit}


def test_a_process_is_moved_into_all_of_them(groups: HostGroups) -> None:
    """An added process is in every cgroup of the job, which cannot be removed while it lives."""
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as child:
        groups.add(child.pid)
        for folder in groups.folders:
            assert (folder / "cgroup.procs").read_text(encoding="ascii").split() == [str(child.pid)]
        assert not groups.remove()
        assert child.stdin is not None
        child.stdin.close()
        child.wait()
    assert groups.remove()
    assert not any(folder.exists() for folder in groups.folders)


def test_this_process_stays_where_it_is() -> None:
    """The move that starts the kernel's wait early moves nothing."""
    place = Path("/proc/self/cgroup").read_text(encoding="ascii")
    groups = made_groups()
    assert Path("/proc/self/cgroup").read_text(encoding="ascii") == place
    assert groups.remove()


def test_the_limit_on_tasks_is_real(groups: HostGroups, need: Need) -> None:
    """A process cannot exceed the limit on tasks."""
    need("pids" in groups.holds, "this host gives us no pids group", installable=False)
    code = "read x; for i in 1 2 3 4 5 6 7 8 9; do sleep 60 & done"
    with subprocess.Popen(
        ["/bin/sh", "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as child:
        groups.add(child.pid)
        assert child.stdin is not None
        child.stdin.write(b"go\n")
        child.stdin.close()
        assert child.wait(60) != 0
        (pids,) = {(folder / "cgroup.procs").read_text(encoding="ascii") for folder in groups.folders}
        left = [int(pid) for pid in pids.split()]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert 0 < len(left) <= TASKS


def test_a_used_name_is_not_shared(groups: HostGroups) -> None:
    """A second job with the same name gets no cgroups and does not change the first ones."""
    name = Path(groups.folders[0]).name
    second = make_groups(name, memory_bytes=1 << 30, tasks=1000)
    assert second.folders == ()
    test_declared_limits_are_set(groups)
