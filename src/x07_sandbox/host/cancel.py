"""Cancellation of a run by a signal, another thread or the caller."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from x07_sandbox.errors import Cancelled
from x07_sandbox.host.locks import LOOK_AGAIN_S
from x07_sandbox.host.poll import Event, wait_readable

BY_KILL: Final = -1  # in place of a signal


class Cancel:
    """A cancellation request by a signal handler, another thread or `x07 kill`. The event loop polls its descriptor."""

    def __init__(self) -> None:
        self._event = Event()
        self.fd = self._event.fd
        self.wakeup_fd = self._event.write_fd  # a byte written to it makes *fd* readable
        self._signal: int | None = None
        self._waiting = False

    @property
    def signal(self) -> int | None:
        """The signal that requested cancellation; 0 for the caller, BY_KILL for `x07 kill`, None for no request."""
        readable = self._signal is None and wait_readable(self.fd, 0)
        return BY_KILL if readable and self._signal is None else self._signal

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


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """The caller of a job. progress: called with a line before a step that takes seconds, and with "" after it."""

    cancel: Cancel
    progress: Callable[[str], None] = lambda _text: None


@contextlib.contextmanager
def cancelled_by_signals() -> Iterator[Cancel]:
    """Make SIGINT, SIGTERM and SIGHUP cancel the run. Even a second signal does not prevent the VM's removal."""
    # Ignored signals stay ignored, as under nohup or in the background of a script.
    wanted = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    with contextlib.closing(Cancel()) as cancel:
        # Python calls handlers in the main thread only. If the kernel delivers the signal to another thread, no system
        # call of the main thread is interrupted (signal(7)). But a byte is written, for which every wait polls.
        earlier_fd = signal.set_wakeup_fd(cancel.wakeup_fd, warn_on_full_buffer=False)
        before = {number: signal.signal(number, lambda got, _frame: cancel.interrupt(got)) for number in wanted}
        try:
            yield cancel
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(earlier_fd)
