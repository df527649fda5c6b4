"""Start of x07's own background processes, which outlive the command that starts them."""

import subprocess
import sys
import threading
from typing import IO

from x07_sandbox.host import close_on_fork
from x07_sandbox.host.threads import start_thread
from x07_sandbox.host.variables import inherited_environment


def start_in_background(
    module: str,
    *words: str,
    ready_fd: int | None = None,
    errors: IO[bytes],
    stdin: int = subprocess.DEVNULL,
    cwd: str | None = None,
) -> subprocess.Popen[bytes]:
    """Run *module* in a session of its own, isolated from this user's Python settings. Raises OSError.

    The process inherits *ready_fd*, if there is one; its number is the last argument. errors: its standard error.
    """
    ready = [] if ready_fd is None else [ready_fd]
    with close_on_fork.no_fork():
        return subprocess.Popen(
            [sys.executable, "-I", "-m", module, *words, *map(str, ready)],
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=ready,
            start_new_session=True,
            cwd=cwd,
            env=inherited_environment(),
        )


def reap_later(child: subprocess.Popen[bytes]) -> None:
    """Reap *child* once it has ended, in a thread. Raises OSError if no thread can be started."""
    start_thread(threading.Thread(target=child.wait, name="x07-reaper", daemon=True))
