"""One thread that starts every virtual machine of this process, and lives as long as the process.

The kernel's parent-death signal follows the *thread* that started a child (prctl(2)): a short-lived one would take the
machine with it.
"""

from __future__ import annotations

import queue
import signal
import subprocess
import threading
from typing import Final

import msgspec

from x07_sandbox.errors import HostError
from x07_sandbox.host import close_on_fork
from x07_sandbox.host.threads import start_thread

_ENVIRONMENT: Final = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """A child to start: descriptors are lent and stay the caller's.

    stdio_fd: its standard input and output; None for none. env: all of its variables; None for the usual few.
    """

    argv: list[str]
    pass_fds: tuple[int, ...]
    stderr_fd: int
    stdio_fd: int | None = None
    env: dict[str, str] | None = None


_Answer = queue.SimpleQueue["subprocess.Popen[bytes] | OSError"]
_requests: queue.SimpleQueue[tuple[Launch, _Answer]] = queue.SimpleQueue()
_lock = threading.Lock()
_thread: threading.Thread | None = None


def launch(request: Launch) -> subprocess.Popen[bytes]:
    """Start the child from the launcher thread. Raises HostError, and OSError if it cannot be executed."""
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        why = "SIGCHLD is ignored, so nobody would learn how it ended"
        raise HostError("cannot start a virtual machine", why, "Give that signal back its default: signal.SIG_DFL")
    global _thread  # noqa: PLW0603 - one thread a process is the point
    with _lock:
        if _thread is None or not _thread.is_alive():  # not alive: after a fork
            _thread = start_thread(threading.Thread(target=_serve, name="x07-launcher", daemon=True))
    answer: _Answer = queue.SimpleQueue()
    _requests.put((request, answer))
    child = answer.get()
    if isinstance(child, OSError):
        raise child
    return child


def _serve() -> None:
    # A child inherits the mask of this thread: with SIGALRM blocked its own deadline would never fire.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    while True:
        request, answer = _requests.get()
        try:
            with close_on_fork.no_fork():
                child = subprocess.Popen(
                    request.argv,
                    stdin=subprocess.DEVNULL if request.stdio_fd is None else request.stdio_fd,
                    stdout=subprocess.DEVNULL if request.stdio_fd is None else request.stdio_fd,
                    stderr=request.stderr_fd,
                    pass_fds=request.pass_fds,
                    env=_ENVIRONMENT if request.env is None else request.env,
                    cwd="/",
                    start_new_session=True,
                )
        except OSError as exc:
            answer.put(exc)
        else:
            answer.put(child)
