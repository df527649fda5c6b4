"""Deadlines: absolute, shared and monotonic."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from x07_sandbox.host.clocks import Deadline

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
