"""Cancellation of a run by a signal, another thread or the caller."""

import contextlib
import os
from collections.abc import Callable, Iterator

import msgspec

from x07_sandbox.errors import Cancelled
from x07_sandbox.host.locks import LOOK_AGAIN_S
from x07_sandbox.host.poll import wait_readable


class Cancel:
    """A cancellation request. A signal handler or another thread makes it, and the event loop polls its descriptor."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.signal: int | None = None
        self._waiting = False

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
        if self.signal is not None:
            why = "a signal was received" if self.signal else "cancellation was requested"
            cancelled = Cancelled("the run was cancelled", why, "Start it again")
            cancelled.signal = self.signal
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
        if self.signal is None:
            self.signal = signal
        os.eventfd_write(self.fd, 1)

    def close(self) -> None:
        """Close the descriptor that event loops poll."""
        os.close(self.fd)


class Notice(str):
    """A progress line that announces a long one-time step. Unlike other lines, it is printed without a terminal too."""

    __slots__ = ()


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """The caller of a job. progress: called with a line before a step that takes seconds, and with "" after it."""

    cancel: Cancel
    progress: Callable[[str], None] = lambda _text: None
