"""Descriptors that are this process's alone: a child that is forked from it must not hold them open.

A lock (flock(2)) and a connection last as long as any copy of their descriptor is open. All are closed on exec; but a
Python program may fork without executing, in multiprocessing say, and that child would keep a dead parent's locks.
"""

from __future__ import annotations

import contextlib
import fcntl
import os

_ours: set[int] = set()


def keep(fd: int) -> int:
    """From now on a forked child has /dev/null in place of *fd*, which is given back."""
    _ours.add(fd)
    return fd


def unlock(fd: int) -> None:
    """Let go of the lock that one of them holds, and close it; also where a child has just been forked."""
    _ours.discard(fd)
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def forget(fd: int) -> None:
    """Its owner closes it."""
    _ours.discard(fd)


def _after_fork() -> None:
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


os.register_at_fork(after_in_child=_after_fork)
