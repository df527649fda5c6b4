"""Advisory file locks between processes of one user."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from x07_sandbox.host import forks


@contextlib.contextmanager
def file_lock(path: Path, *, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold an exclusive flock(2) on *path*, which is made when missing and never removed.

    on_wait is called once when another process holds the lock, before waiting for it.
    """
    fd = forks.keep(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    try:
        _take(fd, on_wait)
        yield
    finally:
        forks.unlock(fd)


@contextlib.contextmanager
def opened_lock(owned_fd: int, *, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """The same on what is open already, for reading at least. It is closed at the end."""
    forks.keep(owned_fd)
    try:
        _take(owned_fd, on_wait)
        yield
    finally:
        forks.unlock(owned_fd)


def share_folder(path: Path) -> int:
    """A descriptor of a folder, under a shared flock(2) until it is closed: nobody removes it meanwhile.

    Raises OSError, BlockingIOError where somebody is removing it.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextlib.contextmanager
def folder_to_remove(path: Path) -> Iterator[bool]:
    """Whether nobody shares the folder; nobody does before the end of the context then. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock on a folder; of one that is not there, or is a link, none does."""
    try:
        with folder_to_remove(path) as free:
            return not free
    except OSError:
        return False


def _take(fd: int, on_wait: Callable[[], None] | None) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if on_wait is not None:
            on_wait()
        fcntl.flock(fd, fcntl.LOCK_EX)
