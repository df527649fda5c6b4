"""How many machines run at once, over all processes of the user: the rest wait in a queue, first come first served.

cache/slots/<n>     one file a machine that may run; whoever has it locked (flock(2)) runs one
cache/slots/turn    locked by the first of the queue while it waits for a slot
cache/slots/warm-<n>    one file a machine that may wait, warm, in a pool; locked by the process whose pool it is

Locks, so that whatever becomes of a process its slot is free with it. The kernel serves those who wait for one lock in
order, so the queue needs no numbers; only its first looks at the slots.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Self

from x07_sandbox.errors import Cancelled, HostError, RefusedError
from x07_sandbox.host import close_on_fork, settings
from x07_sandbox.host.clocks import Deadline
from x07_sandbox.host.cores import cores
from x07_sandbox.host.memory import memory_bytes
from x07_sandbox.host.paths import cache_folder, open_private_file
from x07_sandbox.host.variables import number

_VARIABLE: Final = "X07_VM_MAX_RUNNING"
MEMORY_EACH: Final = 2 * settings.GIB  # of RAM, of which an ordinary machine uses a small part
_LOOK_AGAIN_S: Final = 0.003
_SAY_AFTER_S: Final = 1.0
_LOOKS: Final = 5
_BETWEEN_LOOKS_S: Final = 0.05


def max_running() -> int:
    """How many machines may run at once: X07_VM_MAX_RUNNING, else what cores and memory hold. Raises UsageError.

    Each counts for 2 GiB of three quarters of the memory; the last quarter is for machines that wait in a pool.
    """
    if (named := number(_VARIABLE)) is not None:
        return named
    return max(1, min(cores(), memory_bytes() * 3 // 4 // MEMORY_EACH))


@contextlib.contextmanager
def admitted(
    *, cancel_fd: int, timeout_s: float, progress: Callable[[str], None] = lambda _text: None
) -> Iterator[float]:
    """Around a machine that runs; the seconds that it waited. cancel_fd: ends the wait when it becomes readable.

    Raises RefusedError after timeout_s, Cancelled, UsageError.
    """
    begun = time.monotonic()
    place = _Place(cache_folder("slots"), max_running())
    try:
        if not place.take_now():
            place.wait(cancel_fd, timeout_s, progress)
        yield time.monotonic() - begun
    finally:
        place.leave()


@contextlib.contextmanager
def kept_warm(count: int, most: int) -> Iterator[None]:
    """Around a pool in which *count* machines wait, of the *most* for which there is memory. Raises HostError."""
    folder = cache_folder("slots")
    with contextlib.ExitStack() as stack:
        had = 0
        for number in range(most):
            if had == count:
                break
            if (fd := _locked(folder / f"warm-{number}")) is not None:
                stack.callback(close_on_fork.unlock, fd)
                had += 1
        if had < count:
            why = f"memory holds {most} machines that wait, and other pools leave {had} of them"
            raise HostError("cannot keep a pool", why, "Set a smaller size, or end another pool")
        yield


def _locked(path: Path) -> int | None:
    """A descriptor that has the file at *path* locked, or None where another has it."""
    fd = _opened(path)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        close_on_fork.unlock(fd)
        return None
    return fd


def _opened(path: Path) -> int:
    return close_on_fork.add(open_private_file(path, os.O_RDWR))


class _Place:
    """A place in the queue, then a slot."""

    def __init__(self, folder: Path, slots: int) -> None:
        self._folder = folder
        self._slots = slots
        self._fd: int | None = None

    def take_now(self) -> bool:
        """A slot without waiting, if nobody waits and one is free."""
        if (turn := _locked(self._folder / "turn")) is None:
            return False
        try:
            return self._take()
        finally:
            close_on_fork.unlock(turn)

    def wait(self, cancel_fd: int, timeout_s: float, progress: Callable[[str], None]) -> None:
        """Queue until there is a slot."""
        deadline = Deadline.after(timeout_s)
        say_at = Deadline.after(_SAY_AFTER_S)
        said = False
        with _Turn(_opened(self._folder / "turn")) as turn:
            while not deadline.passed():
                # No event tells of several locks at once: the first of the queue looks at them, the others sleep.
                pause_s = _LOOK_AGAIN_S if turn.come else _SAY_AFTER_S
                if turn.cancelled(cancel_fd, min(deadline.left_s(), pause_s)):
                    raise Cancelled("the run was cancelled", "it was waiting for a machine", "Start it again")
                if not said and say_at.passed():
                    progress(f"waiting: {self._slots} machines run, as many as {_VARIABLE} or cores and memory allow")
                    said = True
                if self._take() if turn.come else said and self._nobody_takes():
                    return
        longer = "" if timeout_s >= settings.QUEUE_S else "a longer --queue-timeout of x07 run, or "
        raise RefusedError(
            "no machine was free in time",
            f"{self._slots} run, and {timeout_s:.0f} s of waiting are over",
            f"Set {longer}a larger {_VARIABLE}",
        )

    def _nobody_takes(self) -> bool:
        """Take a slot that stays free; whether we have one now. A stopped first, by Ctrl-Z say, holds nobody up."""
        for look in range(_LOOKS):
            if not self._take():
                return False
            if look < _LOOKS - 1:
                self.leave()
                time.sleep(_BETWEEN_LOOKS_S)
        return True

    def leave(self) -> None:
        """Give the slot back."""
        if self._fd is not None:
            close_on_fork.unlock(self._fd)
            self._fd = None

    def _take(self) -> bool:
        for slot in range(self._slots):
            if (fd := _locked(self._folder / str(slot))) is not None:
                self._fd = fd
                return True
        return False


class _Turn:
    """The lock of the queue's first, and the wait for it.

    Only the end of a process ends its flock(2). So a child waits on our open file, to which the lock then belongs. When
    we are killed it waits on, and ends at its turn.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.come = False
        self._pidfd = -1
        self._child: subprocess.Popen[bytes] | None = None
        try:
            with close_on_fork.no_fork():
                self._child = subprocess.Popen(
                    ["/usr/bin/flock", "-x", str(fd)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=(fd,),
                    env={},
                    process_group=0,  # Ctrl-C is for us, and we end it
                )
            try:
                self._pidfd = os.pidfd_open(self._child.pid)
            except ProcessLookupError:
                self._took()  # it has ended, and nobody waited for it, since SIGCHLD is ignored
        except BaseException as exc:  # Ctrl-C too: a lock that nobody knows of would hold the queue
            self.__exit__()
            if not isinstance(exc, OSError):
                raise
            missing = isinstance(exc, FileNotFoundError)
            fix = "Install util-linux" if missing else "Raise the limits of this shell: ulimit -a shows them"
            raise HostError("cannot wait for a machine", f"flock: {exc.strerror or exc}", fix) from exc

    def __enter__(self) -> Self:
        return self

    def cancelled(self, cancel_fd: int, timeout_s: float) -> bool:
        """Wait until cancel_fd is readable (True), our turn has come, or timeout_s seconds are over."""
        poll = select.poll()
        poll.register(cancel_fd, select.POLLIN)
        if not self.come:
            poll.register(self._pidfd, select.POLLIN)
        ready = {fd for fd, _events in poll.poll(timeout_s * 1000)}
        if self._pidfd in ready:
            self._took()
        return cancel_fd in ready

    def _took(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it is ours already, unless the child was killed
        except BlockingIOError:
            raise HostError("cannot wait for a machine", "flock was ended", "Start it again") from None
        self.come = True

    def __exit__(self, *_exc: object) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        if self._pidfd >= 0:
            os.close(self._pidfd)
        close_on_fork.unlock(self._fd)
