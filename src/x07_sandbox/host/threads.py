"""Starting a thread, where a limit may forbid one more."""

from __future__ import annotations

import errno
import os
import threading


def start_thread(thread: threading.Thread) -> threading.Thread:
    """It, started. Raises OSError, EAGAIN, where there may be no more; Python's own error would look like a bug."""
    try:
        thread.start()
    except RuntimeError as exc:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from exc
    return thread
