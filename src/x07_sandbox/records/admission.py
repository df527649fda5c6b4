"""Admission: how many machines of the user run at once, in all processes, with a first-come first-served queue.

cache/slots/<n>     one file per running machine, locked (flock(2)) by the machine's x07 process
cache/slots/turn    locked by the first process in the queue while it waits for a slot
cache/slots/sandbox-<n>, cache/slots/sandbox-turn    the same for sandboxes, which last longer
cache/slots/warm-<n>    one file per waiting machine of a pool, locked by the pool's process

A lock ends with the process that holds it. The kernel grants a lock in the order in which processes asked for it.
"""

import contextlib
import fcntl
import os
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from x07_sandbox.errors import Cancelled, Command, HostError, RefusedError
from x07_sandbox.host import settings
from x07_sandbox.host.linux import cores, memory_bytes, open_pidfd
from x07_sandbox.host.paths import cache_folder, fix_for, open_private_file
from x07_sandbox.host.processes import close_on_fork, need_exit_statuses
from x07_sandbox.host.variables import number
from x07_sandbox.host.waiting import Deadline

MEMORY_PER_MACHINE: Final = 2 * settings.GIB  # of which an ordinary machine uses a small part
_MEMORY_PER_SANDBOX: Final = settings.GIB
_SANDBOXES_MAX: Final = 64
_MEMORY_PER_FORK: Final = 128 * settings.MIB  # forks of one sandbox share most of their memory
_FORKS_MAX: Final = 256
_LOOK_AGAIN_S: Final = 0.003
_SAY_AFTER_S: Final = 1.0
_LEAST_S: Final = 0.5
_ULIMIT: Final = ("Raise the limits of this shell: ", Command("ulimit -a"))


class Slots(msgspec.Struct, frozen=True):
    """One kind of slots. prefix: of the names of its files. variable: sets the number. most: the default number.

    rule: words for the default. taken: words for what has the slots. flag: the words for a longer wait.
    """

    prefix: str
    variable: str
    most: Callable[[], int]
    rule: str
    taken: str
    flag: str

    def count(self) -> int:
        """Return how many machines may run at once. Raises UsageError."""
        named = number(self.variable)
        return self.most() if named is None else named


def _for_runs() -> int:
    return max(1, min(cores(), memory_bytes() * 3 // 4 // MEMORY_PER_MACHINE))  # the last quarter is for waiting ones


def _for_sandboxes() -> int:
    return max(2, min(_SANDBOXES_MAX, memory_bytes() // 2 // _MEMORY_PER_SANDBOX))  # most are idle most of the time


def _for_forks() -> int:
    return max(2, min(_FORKS_MAX, memory_bytes() // 2 // _MEMORY_PER_FORK))


_LONGER: Final = "a longer --queue-timeout of x07 run, or "
RUNS: Final = Slots("", "X07_VM_MAX_RUNNING", _for_runs, "cores and memory", "VMs are running", _LONGER)
SANDBOXES: Final = Slots("sandbox-", "X07_VM_MAX_SANDBOXES", _for_sandboxes, "memory", "sandboxes are open", "")

FORKS: Final = Slots("fork-", "X07_VM_MAX_FORKS", _for_forks, "memory", "forks of sandboxes are open", "")


def max_running() -> int:
    """Return how many machines of runs may run at once. Raises UsageError."""
    return RUNS.count()


@contextlib.contextmanager
def admitted(
    *,
    cancel_fd: int,
    timeout_s: float,
    progress: Callable[[str], None] = lambda _text: None,
    slots: Slots = RUNS,
    before_wait: Callable[[], object] = lambda: None,
) -> Iterator[float]:
    """Wait for a slot, hold it during the context, and yield the seconds waited. before_wait: called if none is free.

    Raises RefusedError after timeout_s, Cancelled once cancel_fd is readable, UsageError for a bad number of slots.
    """
    started_at = time.monotonic()
    queue = _Queue(cache_folder("slots"), slots)
    slot = queue.free_slot_if_nobody_waits()
    if slot is None:
        before_wait()
        slot = queue.slot_after_waiting(cancel_fd, timeout_s, progress)
    try:
        yield time.monotonic() - started_at
    finally:
        close_on_fork.unlock(slot)


@contextlib.contextmanager
def warm_slots(count: int, most: int) -> Iterator[None]:
    """Reserve room for *count* waiting machines. Raises HostError if all pools together would have more than *most*."""
    folder = cache_folder("slots")
    with contextlib.ExitStack() as stack:
        reserved = 0
        for number in range(most):
            if reserved < count and (fd := _locked(folder / f"warm-{number}")) is not None:
                stack.callback(close_on_fork.unlock, fd)
                reserved += 1
        if reserved < count:
            why = f"memory allows {most} waiting VMs, and other pools leave only {reserved} of them"
            raise HostError("cannot start a pool", why, "Set a smaller size, or stop another pool")
        yield


def _locked(path: Path) -> int | None:
    """Return a descriptor that locks the file, or None if another process has the lock."""
    fd = _opened(path)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        close_on_fork.unlock(fd)
        return None
    return fd


def _opened(path: Path) -> int:
    return close_on_fork.add(open_private_file(path, os.O_RDWR))


class _Queue:
    """The slots of one kind and the queue for them."""

    def __init__(self, folder: Path, slots: Slots) -> None:
        self._folder = folder
        self._slots = slots
        self._most = slots.count()
        self._turn = folder / f"{slots.prefix}turn"

    def free_slot(self) -> int | None:
        """Lock the first free slot and return its descriptor, or return None if all slots are taken."""
        paths = (self._folder / f"{self._slots.prefix}{number}" for number in range(self._most))
        return next((fd for path in paths if (fd := _locked(path)) is not None), None)

    def free_slot_if_nobody_waits(self) -> int | None:
        """Lock a free slot and return its descriptor, or return None if there is none or others wait."""
        if (turn := _locked(self._turn)) is None:
            return None
        try:
            return self.free_slot()
        finally:
            close_on_fork.unlock(turn)

    def slot_after_waiting(self, cancel_fd: int, timeout_s: float, progress: Callable[[str], None]) -> int:
        """Wait for a free slot, lock it and return its descriptor. Raises RefusedError, Cancelled, HostError.

        A waiting flock(2) cannot be cancelled. So a child process waits for the turn's lock on an open file that this
        process shares with the child. If this process is killed, the child ends as soon as it gets the lock.
        """
        need_exit_statuses()  # of the child process
        # Another process may hold the turn for a moment although slots are free.
        deadline, say_at = Deadline.after(max(timeout_s, _LEAST_S)), Deadline.after(_SAY_AFTER_S)
        first = said = False
        with contextlib.ExitStack() as stack:
            turn = _opened(self._turn)
            stack.callback(close_on_fork.unlock, turn)
            pidfd = _start_flock(turn, stack)
            while not deadline.passed():
                poll = select.poll()
                poll.register(cancel_fd, select.POLLIN)
                if not first:
                    poll.register(pidfd, select.POLLIN)
                # There is no event for several locks: the first in the queue polls them, the others sleep.
                ready = dict(poll.poll(min(deadline.left_s(), _LOOK_AGAIN_S if first else _SAY_AFTER_S) * 1000))
                if cancel_fd in ready:
                    raise Cancelled("the run was cancelled", "it was waiting for a free slot", "Start it again")
                if pidfd in ready:
                    first = True
                    try:
                        fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)  # succeeds unless the child was killed
                    except BlockingIOError:
                        raise HostError("cannot wait for a free slot", "flock was killed", "Start it again") from None
                if not said and say_at.passed():
                    set_by = f"set by {self._slots.variable}, or by {self._slots.rule}"
                    progress(f"waiting until one ends: {self._most} {self._slots.taken}, as many as may be ({set_by})")
                    said = True
                if first and (slot := self.free_slot()) is not None:
                    return slot
        longer = "" if timeout_s >= settings.QUEUE_S else self._slots.flag
        raise RefusedError(
            "no slot was free in time",
            f"{self._most} {self._slots.taken}, as many as may be, and none ended within {timeout_s:g} s",
            f"Set {longer}a larger {self._slots.variable}",
            code="no-slot",
        )


def _start_flock(fd: int, stack: contextlib.ExitStack) -> int:
    """Start flock(1), which waits for the lock of *fd*, and return its pidfd. *stack* ends it. Raises HostError."""
    try:
        with close_on_fork.no_fork():
            child = subprocess.Popen(
                ["/usr/bin/flock", "-x", str(fd)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(fd,),
                env={},
                process_group=0,  # Ctrl-C is handled here
            )
        stack.callback(child.wait)
        stack.callback(child.kill)
        pidfd = open_pidfd(child.pid)
    except OSError as exc:
        fix = "Install util-linux" if isinstance(exc, FileNotFoundError) else fix_for(exc, _ULIMIT)
        raise HostError("cannot wait for a free slot", f"flock failed with {exc.strerror or exc}", fix) from exc
    stack.callback(os.close, pidfd)
    return pidfd
