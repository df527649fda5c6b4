"""Signals that end a run, for every command that has one."""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING

from x07_sandbox.host.cancel import Cancel

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def cancelled_by_signals() -> Iterator[Cancel]:
    """SIGINT, SIGTERM and SIGHUP end the run in good order; a second one as well."""
    cancel = Cancel()
    # What is ignored stays so: by nohup, or in a script's background.
    wanted = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    # The kernel may give a signal to another thread, and then nothing else ends the wait of the main thread, in which
    # Python calls the handler.
    woken = signal.set_wakeup_fd(cancel.wake_fd, warn_on_full_buffer=False)
    before = {number: signal.signal(number, lambda got, _frame: cancel.interrupt(got)) for number in wanted}
    try:
        yield cancel
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken)
        cancel.close()
