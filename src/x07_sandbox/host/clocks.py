"""Time: deadlines on a monotonic clock, wall time for records only."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import msgspec

_STOOD_STILL_S: Final = 0.5  # so late nobody looks who was not stopped, or kept from the processor


def unix_ms() -> int:
    """Wall clock in milliseconds since 1970; for records and labels, never for a decision."""
    return time.time_ns() // 1_000_000


def boot_ms() -> int:
    """Milliseconds since this boot of the kernel, sleep included: no step of the wall clock moves it."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


def unix_ns() -> int:
    """Wall clock in nanoseconds since 1970: what a guest's clock is set to."""
    return time.time_ns()


class Deadline(msgspec.Struct, frozen=True):
    """A point in time that nested calls share. at: seconds on the clock's scale."""

    at: float
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """The deadline *seconds* from now."""
        return cls(time.monotonic() + seconds)

    def left_s(self) -> float:
        """Seconds left, 0.0 when it has passed."""
        return max(0.0, self.at - self.clock())

    def late_s(self) -> float:
        """Seconds since then, 0.0 when it is still to come."""
        return max(0.0, self.clock() - self.at)

    def missed_while_stopped(self) -> bool:
        """Whether it passed while this process stood still: stopped by Ctrl-Z, say, and not the one it waited for."""
        return self.late_s() > _STOOD_STILL_S

    def passed(self) -> bool:
        """Whether it has passed."""
        return self.clock() >= self.at
