"""Waiting: deadlines on a monotonic clock, descriptors, and cancellation by a signal, another thread or the caller.

It uses poll(2), since select(2) does not accept descriptors above 1023. Wall time is for records only.
"""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Final, Self

import msgspec

from x07_sandbox.errors import Cancelled
from x07_sandbox.host import start_thread
from x07_sandbox.host.settings import STOPPED_S

LOOK_AGAIN_S: Final = 0.02  # the polling interval where there is no event
BY_KILL: Final = -1  # in place of a signal
_LATE_S: Final = 0.2  # for data that was sent before a deadline to arrive after it
_STOPPED_S: Final = 0.5  # a process this late was stopped or got no CPU


def unix_ms() -> int:
    """Return the wall clock in milliseconds since 1970; for records and labels only."""
    return time.time_ns() // 1_000_000


def unix_ns() -> int:
    """Return the wall clock in nanoseconds since 1970, to set a guest's clock."""
    return time.time_ns()


class Deadline(msgspec.Struct, frozen=True):
    """A deadline that nested calls share. at: a time in seconds, as *clock* returns it."""

    at: float
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def after(cls, seconds: float) -> Self:
        """Return the deadline *seconds* from now."""
        return cls(time.monotonic() + seconds)

    def left_s(self) -> float:
        """Return the seconds left, or 0.0 once the deadline has passed."""
        return max(0.0, self.at - self.clock())

    def late_s(self) -> float:
        """Return the seconds since the deadline; 0.0 before the deadline."""
        return max(0.0, self.clock() - self.at)

    def missed_while_stopped(self) -> bool:
        """Return whether the deadline passed while this process itself was stopped, for example by Ctrl-Z."""
        return self.late_s() > _STOPPED_S

    def passed(self) -> bool:
        """Return whether the deadline has passed."""
        return self.clock() >= self.at


def read_deadline(deadline: Deadline) -> Deadline:
    """Return a new deadline, for reading the data that arrived before *deadline* passed.

    The new deadline is later if *deadline* passed while this process was stopped.
    """
    return Deadline.after(STOPPED_S if deadline.missed_while_stopped() else _LATE_S)


class Event:
    """A flag for event loops. Its descriptor *fd* is readable while the flag is set."""

    def __init__(self) -> None:
        self.fd, self._write_fd = os.pipe()
        for fd in (self.fd, self._write_fd):
            os.set_blocking(fd, False)

    def set(self) -> None:
        """Set the flag. A signal handler may call this."""
        with contextlib.suppress(BlockingIOError):  # it is set already
            os.write(self._write_fd, b"\1")

    def set_by_signals(self) -> None:
        """Let every signal that has a Python handler set the flag, for a main thread that waits for it.

        The kernel may run the C part of a handler in another thread. Then nothing would interrupt the wait (signal(7)).
        """
        signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)

    def clear(self) -> None:
        """Clear the flag."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self.fd, 4096):
                pass

    def move_to(self, owned_fd: int) -> None:
        """Use a descriptor that is open for reading and writing from now on, under the number of *fd*. Close it."""
        for fd in (self.fd, self._write_fd):
            os.dup2(owned_fd, fd, inheritable=False)
        os.close(owned_fd)

    def close(self) -> None:
        """Close the descriptors."""
        os.close(self.fd)
        os.close(self._write_fd)


def input_poll(*fds: int) -> select.poll:
    """Return a poll object that reports readable *fds*, in this order."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return poll


def wait_readable(fd: int, timeout_s: float | None = None) -> bool:
    """Wait until a descriptor is readable or at its end. Return False on timeout. timeout_s: None for no limit."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else max(0, int(timeout_s * 1000))))


def wait_writable(fd: int) -> None:
    """Wait until a non-blocking descriptor is writable or its reader has closed it."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    poll.poll()


def write_all(fd: int, data: bytes) -> None:
    """Write all of *data* unbuffered, also if *fd* is non-blocking. Raises OSError."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            wait_writable(fd)


class Cancel:
    """A cancellation request by a signal handler, another thread or `x07 kill`. The event loop polls its descriptor."""

    def __init__(self) -> None:
        self._event = Event()
        self.fd = self._event.fd
        self._signal: int | None = None
        self._waiting = False

    @property
    def signal(self) -> int | None:
        """The signal that requested cancellation; 0 for the caller, BY_KILL for `x07 kill`, None for no request."""
        readable = self._signal is None and wait_readable(self.fd, 0)
        return BY_KILL if readable and self._signal is None else self._signal

    def set_by_signals(self) -> None:
        """Wake a wait of the main thread for every signal that has a Python handler, which requests cancellation."""
        self._event.set_by_signals()

    def listen(self, path: Path) -> None:
        """Let `x07 kill` request cancellation by writing to a named pipe at *path*. Raises OSError."""
        os.mkfifo(path, 0o600)
        # Opened for writing too, since a pipe without a writer is at its end.
        self._event.move_to(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
        if self._signal is not None:
            self._event.set()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Make a signal raise Cancelled in the context. Use this around a wait that does not poll the descriptor."""
        self.check()
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def check(self) -> None:
        """Raise Cancelled if cancellation was requested."""
        if (by := self.signal) is not None:
            why = "a signal was received" if by > 0 else "cancellation was requested"
            cancelled = Cancelled("the run was cancelled", why, "Start it again")
            cancelled.signal = by
            raise cancelled

    def pause(self) -> None:
        """Wait for a polling interval. Raises Cancelled if cancellation was requested."""
        wait_readable(self.fd, LOOK_AGAIN_S)
        self.check()

    def interrupt(self, signal: int) -> None:
        """Request cancellation from a signal handler. Raises Cancelled while the main thread is in `waiting`."""
        self(signal)
        if self._waiting:
            self.check()

    def __call__(self, signal: int = 0) -> None:
        """Request cancellation. signal: the received signal; 0 if no signal made the request."""
        if self._signal is None:
            self._signal = signal
        self._event.set()

    def close(self) -> None:
        """Close the descriptor that event loops poll."""
        self._event.close()


class Notice(str):
    """A progress line that announces a long one-time step. Unlike other lines, it is printed without a terminal too."""

    __slots__ = ()


class Remark(Notice):
    """A progress line about something that was done. On a terminal, later lines do not replace it."""

    __slots__ = ()


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """The caller of a job. progress: called with a line before a step that takes seconds, and with "" after it."""

    cancel: Cancel
    progress: Callable[[str], None] = lambda _text: None


@contextlib.contextmanager
def cancelled_by_signals() -> Iterator[Cancel]:
    """Make SIGINT, SIGTERM and SIGHUP cancel the run. Even a second signal does not prevent the VM's removal."""
    # Ignored signals stay ignored, as under nohup or in the background of a script.
    wanted = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    with contextlib.closing(Cancel()) as cancel, _forwarded(wanted, cancel):
        before = {number: signal.signal(number, lambda got, _frame: cancel.interrupt(got)) for number in wanted}
        try:
            yield cancel
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _forwarded(wanted: Collection[int], cancel: Cancel) -> Iterator[None]:
    """Run a thread that cancels the run when one of the *wanted* signals arrives.

    Python calls handlers in the main thread only. If the kernel delivers the signal to another thread, a blocking
    system call of the main thread is not interrupted (signal(7)).
    """
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)

    def forward() -> None:
        while numbers := os.read(read_fd, 64):
            for number in set(numbers).intersection(wanted):
                cancel(number)

    thread = threading.Thread(target=forward, name="x07-signals", daemon=True)
    with contextlib.suppress(OSError):  # no more threads allowed: the handlers still work
        start_thread(thread)
    before = signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(write_fd)
        if thread.ident is not None:
            thread.join()
        os.close(read_fd)
