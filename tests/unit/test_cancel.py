"""Signals cancel a waiting run, whichever thread receives them."""

from __future__ import annotations

import select
import signal
import threading

from x07_sandbox.host.cancel import cancelled_by_signals


def test_a_signal_that_another_thread_gets_ends_the_wait() -> None:
    """SIGTERM cancels a waiting run even if the kernel delivers it to another thread."""
    over = threading.Event()
    other = threading.Thread(target=over.wait, args=(60,))
    other.start()
    try:
        with cancelled_by_signals() as cancel:
            assert other.ident is not None
            later = threading.Timer(0.2, signal.pthread_kill, (other.ident, signal.SIGTERM))
            later.start()
            poll = select.poll()
            poll.register(cancel.fd, select.POLLIN)
            assert poll.poll(20_000) == [(cancel.fd, select.POLLIN)]
            assert cancel.signal == signal.SIGTERM
            later.join()
    finally:
        over.set()
        other.join()
