"""Locks between processes and threads."""

from __future__ import annotations

import stat
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from x07_sandbox.host.locks import file_lock

if TYPE_CHECKING:
    from pathlib import Path

HOLDER = (
    "import pathlib, sys\n"
    "from x07_sandbox.host.locks import file_lock\n"
    "with file_lock(pathlib.Path(sys.argv[1])):\n"
    "    print('held', flush=True)\n"
    "    sys.stdin.read()\n"
)


def holder(path: Path) -> subprocess.Popen[bytes]:
    """Another process that holds the lock until its input ends."""
    child = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    return child


def test_a_free_lock_needs_no_wait(tmp_path: Path) -> None:
    """A free lock is taken without a wait, and its file, which is opened through no link, is private and stays."""
    waits: list[str] = []
    for _ in range(2):
        with file_lock(tmp_path / "lock", on_wait=lambda: waits.append("wait")):
            assert stat.S_IMODE((tmp_path / "lock").stat().st_mode) == 0o600
    assert waits == []
    assert (tmp_path / "lock").exists()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"), file_lock(tmp_path / "link"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_waiter_reports_once(tmp_path: Path) -> None:
    """A waiter reports once that it waits, and gets the lock when the holder releases it."""
    path = tmp_path / "lock"
    waits: list[int | None] = []
    with holder(path) as child:

        def release() -> None:
            waits.append(child.poll())
            assert child.stdin is not None
            child.stdin.close()

        with file_lock(path, on_wait=release):
            assert child.wait(60) == 0
    assert waits == [None], "told when the other process still held it"


def test_a_killed_holder_releases_its_lock(tmp_path: Path) -> None:
    """A killed holder releases its lock."""
    path = tmp_path / "lock"
    with holder(path) as child:
        child.kill()
        child.wait()
        waits: list[str] = []
        with file_lock(path, on_wait=lambda: waits.append("wait")):
            pass
        assert waits == []


def test_threads_exclude_each_other_too(tmp_path: Path) -> None:
    """Two threads of one process cannot hold a lock at once."""
    path = tmp_path / "lock"
    inside: list[str] = []
    waiting = threading.Event()

    def second() -> None:
        with file_lock(path, on_wait=waiting.set):
            inside.append("second")

    thread = threading.Thread(target=second)
    with file_lock(path):
        thread.start()
        assert waiting.wait(60)
        inside.append("first")
    thread.join(60)
    assert inside == ["first", "second"]


def test_a_wait_can_time_out(tmp_path: Path) -> None:
    """A wait for a lock can have a timeout."""
    path = tmp_path / "lock"
    child = holder(path)
    waits: list[str] = []
    try:
        with (
            pytest.raises(TimeoutError, match="another process has held the lock for 0 s"),
            file_lock(path, on_wait=lambda: waits.append("wait"), most_s=0.1),
        ):
            pass
        assert waits == ["wait"]
    finally:
        child.communicate(b"")
    with file_lock(path, most_s=0.1):
        pass
