"""Waiting for one descriptor: not by select(2), which takes none above 1023, and our caller may have any number."""

from __future__ import annotations

import select


def wait_readable(fd: int, timeout_s: float | None = None) -> bool:
    """Whether something comes, or the end, within that time, in whole milliseconds; None waits for ever."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else max(0, int(timeout_s * 1000))))


def wait_writable(fd: int) -> None:
    """Wait until there is room in a non-blocking descriptor, or nobody left who would read."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    poll.poll()
