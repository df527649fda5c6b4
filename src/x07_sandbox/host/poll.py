"""Waiting for one descriptor by poll(2), since select(2) does not accept descriptors above 1023."""

import os
import select


def wait_readable(fd: int, timeout_s: float | None = None) -> bool:
    """Wait until a descriptor is readable or at its end. Return False on timeout. timeout_s: None for no limit."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else max(0, int(timeout_s * 1000))))


def wait_writable(fd: int) -> None:
    """Wait until a non-blocking descriptor is writable or its reader has closed it."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    poll.poll()


def write_all(fd: int, data: bytes) -> None:
    """Write all of *data* unbuffered, also if *fd* is non-blocking. Raises OSError."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            wait_writable(fd)
