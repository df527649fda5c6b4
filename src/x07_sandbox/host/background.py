"""Start of x07's own background processes, which outlive the command that starts them."""

import subprocess
import sys
from typing import IO

from x07_sandbox.host import close_on_fork
from x07_sandbox.host.variables import inherited_environment


def start_in_background(
    module: str, *words: str, ready_fd: int, errors: IO[bytes], stdin: int = subprocess.DEVNULL, cwd: str | None = None
) -> subprocess.Popen[bytes]:
    """Run *module* in a session of its own, isolated from this user's Python settings. Raises OSError.

    The process inherits *ready_fd*, whose number is its last argument. errors: its standard error.
    """
    with close_on_fork.no_fork():
        return subprocess.Popen(
            [sys.executable, "-I", "-m", module, *words, str(ready_fd)],
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=(ready_fd,),
            start_new_session=True,
            cwd=cwd,
            env=inherited_environment(),
        )
