"""Promises about processes: a number that came back is another process, and only ours are killed."""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from x07_sandbox.host.processes import (
    Identity,
    boot_id,
    has_mark,
    identify,
    is_alive,
    kill_identity,
    pid_namespace,
    wait_gone,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Need

LAST_PID = Path("/proc/sys/kernel/ns_last_pid")
WAIT = "import sys; print('up', flush=True); sys.stdin.read()"


def start(*marks: str) -> subprocess.Popen[bytes]:
    """A process that waits for the end of its input, with these words among its arguments."""
    child = subprocess.Popen([sys.executable, "-c", WAIT, *marks], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"up\n"
    return child


def identity_of(pid: int) -> Identity:
    """The identity of a process that is there."""
    found = identify(pid)
    assert found is not None
    return found


@pytest.fixture
def mark() -> str:
    """A mark as the launcher makes it."""
    return secrets.token_hex(16)


@pytest.fixture
def child(mark: str) -> Iterator[subprocess.Popen[bytes]]:
    """A live process that carries the mark."""
    with start(mark) as process:
        yield process
        process.kill()


def test_a_process_keeps_its_identity(child: subprocess.Popen[bytes]) -> None:
    """Asked twice, a live process is the same; it is alive, and another one is another."""
    identity = identity_of(child.pid)
    assert identity == identify(child.pid)
    assert is_alive(identity)
    assert identity != identify(os.getpid())


def test_what_is_gone_has_no_identity(child: subprocess.Popen[bytes]) -> None:
    """A process that was reaped is not there, not alive, has no mark and no time, and cannot be killed."""
    identity = identity_of(child.pid)
    child.kill()
    child.wait()
    assert identify(child.pid) is None
    assert not is_alive(identity)
    assert not has_mark(child.pid, "")
    assert not kill_identity(identity, "")
    assert wait_gone(identity, 0)


def test_a_zombie_is_not_alive(child: subprocess.Popen[bytes], mark: str) -> None:
    """A process that has ended and waits to be reaped counts as gone and is not signalled."""
    identity = identity_of(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert identify(child.pid) == identity
    assert not is_alive(identity)
    assert not kill_identity(identity, mark)
    assert wait_gone(identity, 0)


@pytest.mark.parametrize("name", ["a) R 1 2 3 4", "((", ") Z ", "a\nb", "\x80\xff"])
def test_a_process_cannot_lie_by_its_name(name: str) -> None:
    """The name of a process, which it may set to anything, does not shift the fields behind it."""
    libc = ctypes.CDLL(None, use_errno=True)
    identity = identity_of(os.getpid())
    comm = Path(f"/proc/self/task/{threading.get_native_id()}/comm")
    before = comm.read_bytes().removesuffix(b"\n")
    set_name = 15  # PR_SET_NAME
    try:
        assert libc.prctl(set_name, name.encode("latin-1"), 0, 0, 0) == 0
        assert identity_of(os.getpid()) == identity
        assert is_alive(identity)
    finally:
        libc.prctl(set_name, before, 0, 0, 0)


def test_another_start_is_another_process(child: subprocess.Popen[bytes], mark: str) -> None:
    """A number whose process started at another time is not ours: it is gone, and who has the number now lives on."""
    identity = identity_of(child.pid)
    earlier = Identity(pid=identity.pid, start_ticks=identity.start_ticks - 1)
    assert not is_alive(earlier)
    assert not kill_identity(earlier, mark)
    assert wait_gone(earlier, 0)
    assert is_alive(identity)


def can_choose_numbers() -> bool:
    """Whether we may say which number the next process gets; the file's mode does not tell."""
    try:
        LAST_PID.write_text(LAST_PID.read_text(encoding="ascii"), encoding="ascii")
    except OSError:
        return False
    return True


@pytest.mark.root
def test_a_number_that_came_back_is_another_process(mark: str, need: Need) -> None:
    """A new process under the number of an old one, with the same arguments, is not taken for it and not killed."""
    need(can_choose_numbers(), "needs root and a kernel with ns_last_pid", installable=False)
    with start(mark) as old:
        identity = identity_of(old.pid)
        old.kill()
    # Start times are counted in ticks: go on when a new process gets a later one.
    while True:
        with start() as other:
            later = identity_of(other.pid).start_ticks > identity.start_ticks
            other.kill()
        if later:
            break
    for _ in range(200):  # others start processes too, and may be faster
        LAST_PID.write_text(str(identity.pid - 1), encoding="ascii")
        with start(mark) as new:
            try:
                if new.pid != identity.pid:
                    continue
                assert identify(new.pid) != identity
                assert not is_alive(identity)
                assert not kill_identity(identity, mark)
                assert wait_gone(identity, 0)
                assert new.poll() is None
                return
            finally:
                new.kill()
    pytest.fail("the number did not come back")


@pytest.mark.parametrize("wrong", ["0" * 32, "{mark}0", "X{mark}"])
def test_nothing_is_killed_without_the_mark(wrong: str, child: subprocess.Popen[bytes], mark: str) -> None:
    """A process without the mark among its arguments is never signalled, though number and start time agree."""
    identity = identity_of(child.pid)
    assert not has_mark(child.pid, wrong.format(mark=mark))
    assert not kill_identity(identity, wrong.format(mark=mark))
    assert is_alive(identity)


def test_what_is_ours_is_killed(child: subprocess.Popen[bytes], mark: str) -> None:
    """Number, start time and mark agree: that process is killed, and is gone."""
    identity = identity_of(child.pid)
    assert has_mark(child.pid, mark)
    assert kill_identity(identity, mark)
    assert wait_gone(identity, 30)
    assert child.wait() == -signal.SIGKILL


def test_a_mark_is_found_within_an_argument(mark: str) -> None:
    """The mark may be part of an argument, as in the name that the virtual machine is given."""
    with start(f"x07-{mark}", "more") as child:
        assert has_mark(child.pid, mark)
        child.kill()


def test_an_empty_mark_is_nobodys(child: subprocess.Popen[bytes]) -> None:
    """A record whose mark is empty kills nothing."""
    identity = identity_of(child.pid)
    assert not kill_identity(identity, "")
    assert is_alive(identity)


def test_waiting_ends_with_the_time_that_was_given(child: subprocess.Popen[bytes]) -> None:
    """A process that lives on is not gone after the time, and is afterwards when it has ended."""
    identity = identity_of(child.pid)
    assert not wait_gone(identity, 0)
    assert not wait_gone(identity, 0.01)
    assert child.stdin is not None
    child.stdin.close()
    assert wait_gone(identity, 30)


def test_a_number_that_came_back_as_a_thread_is_gone(mark: str) -> None:
    """Numbers are shared with threads: one that a thread has now is no process, cannot be killed, and is gone."""
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        assert thread.native_id is not None
        identity = Identity(pid=thread.native_id, start_ticks=1)
        assert not kill_identity(identity, mark)
        assert wait_gone(identity, 0)
    finally:
        end.set()
        thread.join()


def test_boot_and_namespace_have_names() -> None:
    """Boot and pid namespace have names that stay the same, and that a child shares."""
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", boot_id())
    assert re.fullmatch(r"pid:\[\d+\]", pid_namespace())
    code = "from x07_sandbox.host.processes import boot_id, pid_namespace; print(boot_id(), pid_namespace())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [boot_id(), pid_namespace()]
