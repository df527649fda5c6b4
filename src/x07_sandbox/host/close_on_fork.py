"""Descriptors that a forked child must not keep open.

A lock (flock(2)), connection or pipe lasts as long as any copy of its descriptor. O_CLOEXEC does not close the copy of
a child that never calls exec, such as a multiprocessing child. That child would keep a dead parent's locks.
"""

import contextlib
import fcntl
import os
import threading

_ours: set[int] = set()
_starting = threading.RLock()  # only its owner can release it, even if a signal interrupts


def add(fd: int) -> int:
    """Make every child forked from now on replace *fd* by /dev/null. Return *fd*."""
    _ours.add(fd)
    return fd


def unlock(fd: int) -> None:
    """Release the lock of a descriptor and close the descriptor, even if a forked child still has a copy."""
    _ours.discard(fd)
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def close(fd: int) -> None:
    """Close a descriptor. Its lock stays if another process has a copy of the descriptor."""
    _ours.discard(fd)
    os.close(fd)


def discard(fd: int) -> None:
    """Let forked children keep a descriptor that was added before. The caller closes the descriptor."""
    _ours.discard(fd)


class FdGroup:
    """Descriptors that are closed together, exactly once. Forked children do not keep them open."""

    def __init__(self) -> None:
        self._fds: list[int] = []

    def add(self, owned_fd: int) -> int:
        """Add a descriptor and return it."""
        self._fds.append(add(owned_fd))
        return owned_fd

    def close(self) -> None:
        """Close all descriptors. Idempotent."""
        while self._fds:
            close(self._fds.pop())


def no_fork() -> contextlib.AbstractContextManager[object]:
    """Return a context in which this process does not fork.

    subprocess.Popen needs it: Popen waits for a pipe to close, and a forked child would keep the pipe open.
    """
    return _starting


def _after_fork() -> None:
    _starting.release()
    if not _ours:
        return
    with contextlib.suppress(OSError):
        # Not closed: copied objects still refer to these numbers and will close them.
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for fd in _ours:
            with contextlib.suppress(OSError):
                os.dup2(null, fd, inheritable=False)
        os.close(null)
    _ours.clear()


os.register_at_fork(before=_starting.acquire, after_in_parent=_starting.release, after_in_child=_after_fork)
