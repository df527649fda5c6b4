"""Facts about the host: architecture, paths, clocks, locks, processes."""

import errno
import os
import threading


def start_thread(thread: threading.Thread) -> threading.Thread:
    """Start and return a thread. Raises OSError (EAGAIN) at the limit, instead of Python's RuntimeError."""
    try:
        thread.start()
    except RuntimeError as exc:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from exc
    return thread
