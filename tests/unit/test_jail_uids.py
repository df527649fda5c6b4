"""The uid that each running job of root has to itself."""

from __future__ import annotations

import fcntl
import grp
import os
import pwd
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from x07_sandbox.jail.resources import COUNT, free_range, lease_uid

if TYPE_CHECKING:
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
    """No user, group or subordinate range of the host overlaps the uids for jobs."""
    first = free_range()
    uids = range(first, first + COUNT)
    assert 0 not in uids
    assert not [user.pw_name for user in pwd.getpwall() if user.pw_uid in uids]
    assert not [group.gr_name for group in grp.getgrall() if group.gr_gid in uids]
    for file in ("/etc/subuid", "/etc/subgid"):
        lines = Path(file).read_text(encoding="utf-8").split() if Path(file).exists() else []
        for _, start, count in (line.split(":") for line in lines):
            assert set(uids).isdisjoint(range(int(start), int(start) + int(count)))


def test_the_range_exists_in_our_user_namespace() -> None:
    """Every uid for jobs exists in the current user namespace."""
    lines = Path("/proc/self/uid_map").read_text(encoding="ascii").splitlines()
    mapped = [range(int(start), int(start) + int(size)) for start, _, size in (line.split() for line in lines)]
    first = free_range()
    assert any(first in part and first + COUNT - 1 in part for part in mapped)


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
        assert child.wait(30) == 0
    assert not in_use(uid)
