"""A runner that is hit at its n-th step that changes something: `python runner.py HOW N COUNT_FILE WORD...`.

HOW is "kill", for SIGKILL before the step, or the name of an error that the step ends with instead, ENOSPC say. A step
is what Python's own audit (PEP 578) tells of: files made, renamed, removed; processes and sockets. N is 0 to hit
nothing. The words are those of `x07`. How many steps there were is written to COUNT_FILE, unless it was killed.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from pathlib import Path

STEPS = frozenset(
    (
        *("os.mkdir", "os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.truncate", "os.chmod"),
        *("os.chown", "os.utime", "subprocess.Popen", "os.posix_spawn", "os.fork", "socket.bind", "socket.connect"),
    )
)
_CHANGES = os.O_CREAT | os.O_WRONLY | os.O_RDWR
_lock = threading.RLock()
_count = 0


def is_step(event: str, args: tuple[object, ...]) -> bool:
    """Whether an audit event stands for a step."""
    if event == "open":
        path, _, flags = args
        return isinstance(flags, int) and bool(flags & _CHANGES) and not str(path).startswith("/dev/")
    return event in STEPS


def main(how: str, number: int, count_file: str, words: list[str]) -> int:
    """Run the command; its exit code."""
    from x07_sandbox.cli.main import main as x07

    ended: list[bool] = []

    def hook(event: str, args: tuple[object, ...]) -> None:
        global _count  # noqa: PLW0603 - one count for all threads
        if ended or not is_step(event, args):
            return
        with _lock:
            _count += 1
            hit = _count == number
        if hit and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif hit:
            code = getattr(errno, how)
            raise OSError(code, os.strerror(code), str(args[0]) if args else None)

    sys.addaudithook(hook)
    try:
        return x07(words)
    finally:
        ended.append(True)
        Path(count_file).write_text(str(_count), encoding="ascii")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:]))
