"""Cancellation of a run by a signal, another thread or the caller."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Final

import msgspec

from x07_sandbox.errors import Cancelled
from x07_sandbox.host.locks import LOOK_AGAIN_S
from x07_sandbox.host.poll import Event, wait_readable
from x07_sandbox.host.threads import start_thread

BY_KILL: Final = -1  # in place of a signal


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
