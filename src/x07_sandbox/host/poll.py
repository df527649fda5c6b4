"""Waiting for one descriptor by poll(2), since select(2) does not accept descriptors above 1023."""

import contextlib
import os
import select
import signal


class Event:
    """A flag for event loops. Its descriptor *fd* is readable while the flag is set."""

    def __init__(self) -> None:
        self.fd, self._write_fd = os.pipe()
        for fd in (self.fd, self._write_fd):
            os.set_blocking(fd, False)

    def set(self) -> None:
        """Set the flag. A signal handler may call this."""
        with contextlib.suppress(BlockingIOError):  # it is set already
            os.write(self._write_fd, b"\1")

    def set_by_signals(self) -> None:
        """Let every signal that has a Python handler set the flag, for a main thread that waits for it.

        The kernel may run the C part of a handler in another thread. Then nothing would interrupt the wait (signal(7)).
        """
        signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)

    def clear(self) -> None:
        """Clear the flag."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self.fd, 4096):
                pass

    def move_to(self, owned_fd: int) -> None:
        """Use a descriptor that is open for reading and writing from now on, under the number of *fd*. Close it."""
        for fd in (self.fd, self._write_fd):
            os.dup2(owned_fd, fd, inheritable=False)
        os.close(owned_fd)

    def close(self) -> None:
        """Close the descriptors."""
        os.close(self.fd)
        os.close(self._write_fd)


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
