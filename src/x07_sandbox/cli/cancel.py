"""Signals that end a run, for every command that has one."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import TYPE_CHECKING

from x07_sandbox.host.cancel import Cancel
from x07_sandbox.host.threads import start_thread

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator


@contextlib.contextmanager
def cancelled_by_signals() -> Iterator[Cancel]:
    """SIGINT, SIGTERM and SIGHUP end the run in good order; a second one as well."""
    # What is ignored stays so: by nohup, or in a script's background.
    wanted = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    with contextlib.closing(Cancel()) as cancel, _heard(wanted, cancel):
        before = {number: signal.signal(number, lambda got, _frame: cancel.interrupt(got)) for number in wanted}
        try:
            yield cancel
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _heard(wanted: Collection[int], cancel: Cancel) -> Iterator[None]:
    """Around the wait of the main thread, in which alone Python calls a handler.

    The kernel may give a signal to another thread, and then nothing ends that wait (signal(7)): so a thread hears of
    every signal, and asks for the end.
    """
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(write_fd, False)

    def forward() -> None:
        while numbers := os.read(read_fd, 64):
            for number in set(numbers).intersection(wanted):
                cancel(number)

    thread = threading.Thread(target=forward, name="x07-signals", daemon=True)
    with contextlib.suppress(OSError):  # there may be no more threads: the handlers are called all the same
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
