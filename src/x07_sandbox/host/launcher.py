"""The thread that starts every virtual machine of this process.

The kernel sends the parent-death signal when the *thread* that started a child ends (prctl(2)), so this thread must
live as long as the process.
"""

import queue
import signal
import subprocess
import threading

import msgspec

from x07_sandbox.errors import HostError
from x07_sandbox.host import close_on_fork
from x07_sandbox.host.processes import COMMAND_ENVIRONMENT
from x07_sandbox.host.threads import start_thread


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """A child process to start. The caller owns the descriptors and keeps them open until the child has started.

    stdio_fd: the child's standard input and output; None stands for /dev/null. env: None sets only PATH and LC_ALL.
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


def need_exit_statuses() -> None:
    """Raise HostError if this process ignores SIGCHLD: the kernel then discards the exit status of its children."""
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        why = "SIGCHLD is ignored, so the exit status of the VM would be lost"
        fix = "Restore its default: signal.signal(signal.SIGCHLD, signal.SIG_DFL)"
        raise HostError("cannot start a virtual machine", why, fix)


def launch(request: Launch) -> subprocess.Popen[bytes]:
    """Start a child process from the launcher thread. Raises HostError, or OSError if the program cannot be started."""
    need_exit_statuses()
    global _thread  # noqa: PLW0603 - one thread per process
    with _lock:
        if _thread is None or not _thread.is_alive():  # no thread survives a fork
            _thread = start_thread(threading.Thread(target=_serve, name="x07-launcher", daemon=True))
    answer: _Answer = queue.SimpleQueue()
    _requests.put((request, answer))
    child = answer.get()
    if isinstance(child, OSError):
        raise child
    return child


def _serve() -> None:
    # Children inherit this thread's signal mask. If SIGALRM were blocked, the timer of their deadline would do nothing.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    while True:
        request, answer = _requests.get()
        try:
            with close_on_fork.no_fork():
                child: subprocess.Popen[bytes] | OSError = subprocess.Popen(
                    request.argv,
                    stdin=subprocess.DEVNULL if request.stdio_fd is None else request.stdio_fd,
                    stdout=subprocess.DEVNULL if request.stdio_fd is None else request.stdio_fd,
                    stderr=request.stderr_fd,
                    pass_fds=request.pass_fds,
                    env=COMMAND_ENVIRONMENT if request.env is None else request.env,
                    cwd="/",
                    start_new_session=True,
                )
        except OSError as exc:
            child = exc
        answer.put(child)
