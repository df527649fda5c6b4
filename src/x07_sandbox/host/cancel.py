"""Ending what is under way: by a signal, by another thread, by the caller."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from x07_sandbox.errors import Cancelled
from x07_sandbox.host.locks import LOOK_AGAIN_S
from x07_sandbox.host.poll import wait_readable

if TYPE_CHECKING:
    from collections.abc import Iterator


class Cancel:
    """A request to end the run: a signal handler or another thread makes it, the loop polls its descriptor."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.signal: int | None = None
        self._waiting = False

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits without polling the descriptor, such as a lock: there a signal raises Cancelled."""
        self.check()
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def check(self) -> None:
        """For what takes long without waiting. Raises Cancelled once there was a request."""
        if self.signal is not None:
            why = "a signal came" if self.signal else "it was asked to end"
            cancelled = Cancelled("the run was cancelled", why, "Start it again")
            cancelled.signal = self.signal
            raise cancelled

    def pause(self) -> None:
        """Wait a moment for something that no event tells of. Raises Cancelled once there was a request."""
        wait_readable(self.fd, LOOK_AGAIN_S)
        self.check()

    def interrupt(self, signal: int) -> None:
        """As a call, for a signal handler. Raises Cancelled while the main thread is in `waiting`."""
        self(signal)
        if self._waiting:
            self.check()

    def __call__(self, signal: int = 0) -> None:
        """Ask for the end; signal: the one that we got, 0 for a request without one."""
        if self.signal is None:
            self.signal = signal
        os.eventfd_write(self.fd, 1)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)


class Notice(str):
    """A line of progress that is printed without a terminal too: it tells of something long that happens once."""

    __slots__ = ()


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """Whoever asked for a job. progress: gets a line before something that takes seconds, and "" when it is over."""

    cancel: Cancel
    progress: Callable[[str], None] = lambda _text: None
