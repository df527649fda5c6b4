"""Descriptors that are this process's alone: a child that is forked from it must not hold them open.

A lock (flock(2)), a connection and a pipe last as long as any copy of their descriptor is open. All are closed on exec;
but a child of multiprocessing, say, executes nothing, and would keep a dead parent's locks.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading

_ours: set[int] = set()
_starting = threading.RLock()  # one that only its owner can release, whatever a signal tears apart


def add(fd: int) -> int:
    """From now on a forked child has /dev/null in place of *fd*, which is given back."""
    _ours.add(fd)
    return fd


def unlock(fd: int) -> None:
    """Let go of the lock that one of them holds, and close it; also where a child has just been forked."""
    _ours.discard(fd)
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def close(fd: int) -> None:
    """Close one of them; what lock it holds stays with whoever else was given it."""
    _ours.discard(fd)
    os.close(fd)


def discard(fd: int) -> None:
    """Its owner closes it."""
    _ours.discard(fd)


class FdGroup:
    """Descriptors that are closed together, exactly once; a forked child has none of them."""

    def __init__(self) -> None:
        self._fds: list[int] = []

    def add(self, owned_fd: int) -> int:
        """One more, which is given back."""
        self._fds.append(add(owned_fd))
        return owned_fd

    def close(self) -> None:
        """Close them; a second call does nothing."""
        while self._fds:
            close(self._fds.pop())


def no_fork() -> contextlib.AbstractContextManager[object]:
    """Around subprocess.Popen, which waits for the end of a pipe that a child forked meanwhile would hold open."""
    return _starting


def _after_fork() -> None:
    _starting.release()
    if not _ours:
        return
    with contextlib.suppress(OSError):
        # Not closed: objects that were copied with the process still know these numbers, and will close them.
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for fd in _ours:
            with contextlib.suppress(OSError):
                os.dup2(null, fd, inheritable=False)
        os.close(null)
    _ours.clear()


os.register_at_fork(before=_starting.acquire, after_in_parent=_starting.release, after_in_child=_after_fork)
