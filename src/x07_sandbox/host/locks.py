"""Advisory file locks between processes of one user."""

import contextlib
import fcntl
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from x07_sandbox.host.paths import closing_fd, open_private_file
from x07_sandbox.host.processes import close_on_fork
from x07_sandbox.host.waiting import LOOK_AGAIN_S, Deadline

Pause = Callable[[], None]
OnWait = Callable[[str], Pause | None]
"""Called with the path of a folder before a wait for its lock. For the result see `lock_fd_held`."""

_LOOKS: Final = 10
_LOOK_S: Final = 0.002


def _sleep() -> None:
    time.sleep(LOOK_AGAIN_S)


@contextlib.contextmanager
def lock_fd_held(
    owned_fd: int,
    *,
    on_wait: Callable[[], Pause | None] | None = None,
    most_s: float = math.inf,
    pause: Pause = _sleep,
) -> Iterator[None]:
    """Hold an exclusive flock(2) on an open descriptor. The descriptor is closed at the end of the context.

    on_wait: called once before waiting. It may return a function to use as *pause*. most_s: timeout, after which
    TimeoutError is raised. pause: waits for a polling interval; an exception from it ends the wait.
    """
    close_on_fork.add(owned_fd)
    try:
        if not _taken(owned_fd):
            pause = (on_wait() if on_wait is not None else None) or pause
            deadline = Deadline.after(most_s)
            while not _taken(owned_fd):
                if deadline.passed():
                    raise TimeoutError(f"another process has held the lock for {most_s:.0f} s")
                pause()
        yield
    finally:
        close_on_fork.unlock(owned_fd)


def file_lock(
    path: Path,
    *,
    on_wait: Callable[[], None] | None = None,
    most_s: float = math.inf,
    pause: Pause = _sleep,
) -> contextlib.AbstractContextManager[None]:
    """Hold an exclusive flock(2) on *path*, which is created if missing and never removed. See `lock_fd_held`."""
    return lock_fd_held(open_private_file(path, os.O_RDWR), on_wait=on_wait, most_s=most_s, pause=pause)


def lock_shared(path: Path) -> int:
    """Open a folder, take a shared flock(2) on it, and return the descriptor. The lock prevents the folder's removal.

    Forked children do not keep it: close it by `close_on_fork.close`.

    Raises OSError if the folder cannot be opened, and BlockingIOError while another process is removing the folder.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for tries in range(_LOOKS, -1, -1):
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # also briefly during is_locked()
                if not tries:
                    raise
                time.sleep(_LOOK_S)
    except BaseException:
        os.close(fd)
        raise
    return close_on_fork.add(fd)


@contextlib.contextmanager
def lock_for_removal(path: Path) -> Iterator[bool]:
    """Try to lock a folder exclusively. Yield False if a process holds a shared lock. Raises OSError like open(2)."""
    with closing_fd(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)) as fd:
        yield _taken(fd)


def is_locked(path: Path) -> bool:
    """Return whether a process holds a lock on a folder, or False for a missing folder or a link."""
    try:
        with lock_for_removal(path) as free:
            return not free
    except OSError:
        return False


def _taken(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
