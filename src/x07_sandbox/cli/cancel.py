"""Signals that cancel a run."""

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
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
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
