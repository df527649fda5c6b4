"""Thread creation under a shell limit."""

from __future__ import annotations

import subprocess
import sys

LIMITED = """
import errno, os, resource, threading
from x07_sandbox.host.threads import started
from x07_sandbox.host.os_errors import host_error
if os.geteuid() == 0:
    os.setresuid(65431, 65431, 65431)  # root is not counted
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
try:
    started(threading.Thread(target=print))
except OSError as exc:
    print(errno.errorcode[exc.errno], host_error(exc))
"""


def test_a_thread_too_many_is_told_as_the_limit_that_it_is() -> None:
    """A failed thread start names the limit to raise."""
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("EAGAIN cannot go on: Resource temporarily unavailable"), done.stderr
    assert "ulimit -u" in done.stdout
