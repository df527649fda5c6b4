"""Threads, where a limit of the shell leaves none."""

from __future__ import annotations

import subprocess
import sys

LIMITED = """
import errno, os, resource, threading
from x07_sandbox.host.threads import start_thread
from x07_sandbox.host.os_errors import host_error
if os.geteuid() == 0:
    os.setresuid(65431, 65431, 65431)  # root is not counted
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
try:
    start_thread(threading.Thread(target=print))
except OSError as exc:
    print(errno.errorcode[exc.errno], host_error(exc))
"""


def test_a_thread_too_many_is_told_as_the_limit_that_it_is() -> None:
    """Where there may be no more threads that is no bug of ours: the limit to raise is named."""
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("EAGAIN cannot continue: Resource temporarily unavailable"), done.stderr
    assert "ulimit -u" in done.stdout
