"""Process identity: a reused pid is another process, and only our processes are killed."""

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

from x07_sandbox.host.linux import boot_id, pid_namespace
from x07_sandbox.host.processes import Identity, has_mark, identify, is_alive, kill_identity, wait_gone

if TYPE_CHECKING:
    from collections.abc import Iterator


WAIT = "import sys; print('up', flush=True); sys.stdin.read()"


def start(*marks: str) -> subprocess.Popen[bytes]:
    """A process with these arguments that waits for the end of its input."""
    child = subprocess.Popen([sys.executable, "-c", WAIT, *marks], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"up\n"
    return child


def identity_of(pid: int) -> Identity:
    """The identity of an existing process."""
    found = identify(pid)
    assert found is not None
    return found


@pytest.fixture
def mark() -> str:
    """A mark as the launcher makes it."""
    return secrets.token_hex(16)


@pytest.fixture
def child(mark: str) -> Iterator[subprocess.Popen[bytes]]:
    """A live process that carries the mark within an argument."""
    with start(f"x07-{mark}", "more") as process:
        yield process
        process.kill()


def test_an_ended_process_is_not_alive(child: subprocess.Popen[bytes], mark: str) -> None:
    """A zombie counts as gone, and a reaped process has no identity and no mark."""
    identity = identity_of(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    for is_reaped in (False, True):
        assert identify(child.pid) == (None if is_reaped else identity)
        assert not is_alive(identity)
        assert not kill_identity(identity, mark)
        assert wait_gone(identity, 0)
        child.wait()
    assert not has_mark(child.pid, "")


@pytest.mark.parametrize("name", ["a) R 1 2 3 4", "((", ") Z ", "a\nb", "\x80\xff"])
def test_a_process_name_shifts_no_fields(name: str) -> None:
    """A process name cannot shift the other fields of its status."""
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
    """A process with another start time, as after its pid was reused, is another process."""
    identity = identity_of(child.pid)
    earlier = Identity(pid=identity.pid, start_ticks=identity.start_ticks - 1)
    assert not is_alive(earlier)
    assert not kill_identity(earlier, mark)
    assert wait_gone(earlier, 0)
    assert is_alive(identity)


@pytest.mark.parametrize("wrong", ["", "0" * 32, "{mark}0", "X{mark}"])
def test_nothing_is_killed_without_the_mark(wrong: str, child: subprocess.Popen[bytes], mark: str) -> None:
    """A process without the mark among its arguments is never signalled, and an empty mark matches no process."""
    identity = identity_of(child.pid)
    assert not wrong or not has_mark(child.pid, wrong.format(mark=mark))
    assert not kill_identity(identity, wrong.format(mark=mark))
    assert is_alive(identity)


def test_a_matching_process_is_killed(child: subprocess.Popen[bytes], mark: str) -> None:
    """A process whose pid, start time and mark match is killed."""
    identity = identity_of(child.pid)
    assert identity != identify(os.getpid())
    assert has_mark(child.pid, mark)
    assert kill_identity(identity, mark)
    assert wait_gone(identity, 30)
    assert child.wait() == -signal.SIGKILL


def test_a_wait_times_out(child: subprocess.Popen[bytes]) -> None:
    """Waiting for a process to end has a timeout."""
    identity = identity_of(child.pid)
    assert not wait_gone(identity, 0)
    assert not wait_gone(identity, 0.01)
    assert child.stdin is not None
    child.stdin.close()
    assert wait_gone(identity, 30)


def test_a_pid_reused_by_a_thread_is_gone(mark: str) -> None:
    """A pid that is now a thread id counts as gone."""
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
    """Boot id and pid namespace are stable and shared with child processes."""
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", boot_id())
    assert re.fullmatch(r"pid:\[\d+\]", pid_namespace())
    code = "from x07_sandbox.host.linux import boot_id, pid_namespace; print(boot_id(), pid_namespace())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [boot_id(), pid_namespace()]
