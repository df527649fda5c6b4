"""Deadlines are absolute, shared and monotonic. Signals cancel a waiting run, whichever thread receives them."""

from __future__ import annotations

import select
import signal
import threading
import time

from hypothesis import given
from hypothesis import strategies as st

from x07_sandbox.host.waiting import Deadline, cancelled_by_signals

SECONDS = st.floats(0, 1e9)


@given(SECONDS, SECONDS)
def test_time_left_is_never_negative(at: float, now: float) -> None:
    """A deadline never has negative time left, and reports how late it is."""
    deadline = Deadline(at, clock=lambda: now)
    assert deadline.left_s() == max(0.0, at - now)
    assert deadline.late_s() == max(0.0, now - at)
    assert deadline.passed() or not deadline.missed_while_stopped()
    assert deadline.passed() == (now >= at)
    assert deadline.passed() or deadline.left_s() > 0


def test_deadlines_are_on_the_monotonic_clock() -> None:
    """Setting the wall clock moves no deadline."""
    before = time.monotonic()
    deadline = Deadline.after(5)
    assert deadline.clock is time.monotonic
    assert before + 5 <= deadline.at <= time.monotonic() + 5


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
