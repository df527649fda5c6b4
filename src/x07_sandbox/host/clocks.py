"""Deadlines on a monotonic clock. Wall time is for records only."""

import time
from collections.abc import Callable
from typing import Final, Self

import msgspec

_STOPPED_S: Final = 0.5  # a process this late was stopped or got no CPU


def unix_ms() -> int:
    """Return the wall clock in milliseconds since 1970; for records and labels only."""
    return time.time_ns() // 1_000_000


def unix_ns() -> int:
    """Return the wall clock in nanoseconds since 1970, to set a guest's clock."""
    return time.time_ns()


class Deadline(msgspec.Struct, frozen=True):
    """A deadline that nested calls share. at: a time in seconds, as *clock* returns it."""

    at: float
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def after(cls, seconds: float) -> Self:
        """Return the deadline *seconds* from now."""
        return cls(time.monotonic() + seconds)

    def left_s(self) -> float:
        """Return the seconds left, or 0.0 once the deadline has passed."""
        return max(0.0, self.at - self.clock())

    def late_s(self) -> float:
        """Return the seconds since the deadline; 0.0 before the deadline."""
        return max(0.0, self.clock() - self.at)

    def missed_while_stopped(self) -> bool:
        """Return whether the deadline passed while this process itself was stopped, for example by Ctrl-Z."""
        return self.late_s() > _STOPPED_S

    def passed(self) -> bool:
        """Return whether the deadline has passed."""
        return self.clock() >= self.at
