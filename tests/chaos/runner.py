"""A runner with a fault injected at its n-th step: `python runner.py HOW N COUNT_FILE WORD...`.

HOW is "kill" (SIGKILL before the step), the name of an errno with which the step fails, such as ENOSPC, or "gate" or
"inner": before the step, the runner's processes of this kind are killed. Steps are audit events of Python (PEP 578):
files created, renamed or removed, processes, sockets. N = 0 injects no fault. The words are arguments of `x07`, or a
Python program and its arguments. The number of steps is written to COUNT_FILE, unless the runner was killed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import runpy
import signal
import sys
import threading
from pathlib import Path

from msgspec.structs import replace

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
    """Return whether an audit event counts as a step."""
    if event == "open":
        path, _, flags = args
        return isinstance(flags, int) and bool(flags & _CHANGES) and not str(path).startswith("/dev/")
    return event in STEPS


def gates(runner: int) -> list[int]:
    """Return the processes of a runner's egress gates."""
    found = []
    lists = Path(f"/proc/{runner}/task").glob("*/children")  # each thread has its own children
    for pid in (int(word) for path in lists for word in path.read_text(encoding="ascii").split()):
        with contextlib.suppress(OSError):
            if b"network.gate import" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def inner(jobs: Path) -> list[int]:
    """Return the processes of VMs, of all jobs below a folder that have not ended."""
    found = []
    for owner in jobs.glob("*/owner.json"):
        with contextlib.suppress(OSError, KeyError):
            pid = json.loads(owner.read_bytes())["processes"]["inner"]["pid"]
            if not (owner.parent / "done").exists() and Path(f"/proc/{pid}").exists():
                found.append(pid)
    return found


def main(how: str, number: int, count_file: str, words: list[str]) -> int:
    """Run the command and return its exit code."""
    from x07_sandbox.backends.registry import BY_NAME
    from x07_sandbox.cli.main import main as x07

    for name in ("apple-container", "vz"):  # with stand-ins for the programs of a Mac
        BY_NAME[name] = replace(BY_NAME[name], linux=True)
    ended: list[bool] = []

    jobs = Path(os.environ["X07_VM_STATE_DIR"])

    def hook(event: str, args: tuple[object, ...]) -> None:
        global _count  # noqa: PLW0603 - one count for all threads
        if ended or not is_step(event, args):
            return
        with _lock:
            _count += 1
            hit = _count == number
        if hit and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif hit and how in {"gate", "inner"}:
            for pid in gates(os.getpid()) if how == "gate" else inner(jobs):
                os.kill(pid, signal.SIGKILL)
        elif hit:
            code = getattr(errno, how)
            raise OSError(code, os.strerror(code), str(args[0]) if args else None)

    sys.addaudithook(hook)
    try:
        if words[0].endswith(".py"):
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
            return 0
        return x07(words)
    finally:
        ended.append(True)
        Path(count_file).write_text(str(_count), encoding="ascii")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:]))
