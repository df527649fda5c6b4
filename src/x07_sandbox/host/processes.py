"""Processes: starting them, and identifying them by pid, start time and boot, since a pid alone is reused.

A mark is a random text that x07 puts into the arguments of a job's processes, to recognize them later.

One thread starts every virtual machine of this process. The kernel sends the parent-death signal when the *thread* that
started a child ends (prctl(2)), so this thread must live as long as the process.

Descriptors that a forked child must not keep open are given to `close_on_fork`. A lock (flock(2)), connection or pipe
lasts as long as any copy of its descriptor. O_CLOEXEC does not close the copy of a child that never calls exec, such as
a multiprocessing child. That child would keep a dead parent's locks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Annotated, Final

import msgspec

from x07_sandbox.errors import HostError
from x07_sandbox.host import start_thread
from x07_sandbox.host.linux import of_process, open_pidfd, process_ids, send_signal
from x07_sandbox.host.paths import closing_fd
from x07_sandbox.host.variables import inherited_environment
from x07_sandbox.host.waiting import wait_readable

if TYPE_CHECKING:  # imported where a process is started: many commands start none
    import queue
    import subprocess

    _Answer = queue.SimpleQueue[subprocess.Popen[bytes] | OSError]
    _Requests = queue.SimpleQueue[tuple["Launch", _Answer]]

COMMAND_ENVIRONMENT: Final = MappingProxyType({"PATH": "/usr/bin:/bin", "LC_ALL": "C"})


class _CloseOnFork:
    """The descriptors of this process that forked children must not keep open."""

    def __init__(self) -> None:
        self._ours: set[int] = set()
        self._starting = threading.RLock()  # only its owner can release it, even if a signal interrupts
        os.register_at_fork(
            before=self._starting.acquire, after_in_parent=self._starting.release, after_in_child=self._after_fork
        )

    def add(self, fd: int) -> int:
        """Make every child forked from now on replace *fd* by /dev/null. Return *fd*."""
        self._ours.add(fd)
        return fd

    def unlock(self, fd: int) -> None:
        """Release the lock of a descriptor and close the descriptor, even if a forked child still has a copy."""
        self._ours.discard(fd)
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)

    def close(self, fd: int) -> None:
        """Close a descriptor. Its lock stays if another process has a copy of the descriptor."""
        self._ours.discard(fd)
        os.close(fd)

    def discard(self, fd: int) -> None:
        """Let forked children keep a descriptor that was added before. The caller closes the descriptor."""
        self._ours.discard(fd)

    def no_fork(self) -> contextlib.AbstractContextManager[object]:
        """Return a context in which this process does not fork.

        subprocess.Popen needs it: Popen waits for a pipe to close, and a forked child would keep the pipe open.
        """
        return self._starting

    def _after_fork(self) -> None:
        self._starting.release()
        if not self._ours:
            return
        with contextlib.suppress(OSError):
            # Not closed: copied objects still refer to these numbers and will close them.
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            for fd in self._ours:
                with contextlib.suppress(OSError):
                    os.dup2(null, fd, inheritable=False)
            os.close(null)
        self._ours.clear()


close_on_fork: Final = _CloseOnFork()


class FdGroup:
    """Descriptors that are closed together, exactly once. Forked children do not keep them open."""

    def __init__(self) -> None:
        self.fds: list[int] = []

    def add(self, owned_fd: int) -> int:
        """Add a descriptor and return it."""
        self.fds.append(close_on_fork.add(owned_fd))
        return owned_fd

    def close(self) -> None:
        """Close all descriptors. Idempotent."""
        while self.fds:
            close_on_fork.close(self.fds.pop())


class Identity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A process of this boot. start_ticks: field 22 of proc(5) stat, in clock ticks since boot.

    Decoding checks both fields.
    """

    pid: Annotated[int, msgspec.Meta(ge=1, le=2**22)]
    start_ticks: Annotated[int, msgspec.Meta(ge=0, le=2**62)]


def identify(pid: int) -> Identity | None:
    """Return the identity of a process, or None if no process has this pid."""
    fields = _stat_fields(pid)
    return None if fields is None else Identity(pid=pid, start_ticks=int(fields[19]))


def output_of(
    argv: Sequence[str], *, timeout_s: float, env: Mapping[str, str] = COMMAND_ENVIRONMENT
) -> subprocess.CompletedProcess[bytes]:
    """Run a short command without input, and return its output and status. Raises OSError, TimeoutExpired."""
    import subprocess

    no_input = subprocess.DEVNULL
    return subprocess.run(argv, stdin=no_input, capture_output=True, timeout=timeout_s, check=False, env=env, cwd="/")


def own_identity() -> Identity:
    """Return the identity of this process. Raises HostError if /proc does not show it."""
    found = identify(os.getpid())
    if found is None:
        raise HostError("cannot record the job", "/proc does not show this process", "Mount /proc here")
    return found


def _stat_fields(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat after the command name, which may contain any characters."""
    data = of_process(pid, "stat")
    return None if data is None else data.decode("utf-8", "replace").rpartition(")")[2].split()


def has_mark(pid: int, mark: str) -> bool:
    """Return whether *mark* is not empty and is in the arguments of a process. Only our launcher sets marks."""
    return bool(mark) and mark.encode() in (of_process(pid, "cmdline") or b"")


def processes_with_mark(mark: str) -> list[Identity]:
    """Return every other visible process that has *mark* in its arguments."""
    found = []
    for pid in process_ids():
        with contextlib.suppress(PermissionError):  # another user's, with hidepid
            if pid != os.getpid() and has_mark(pid, mark) and (identity := identify(pid)) is not None:
                found.append(identity)
    return found


def is_alive(identity: Identity) -> bool:
    """Return whether the process still exists and is not a zombie."""
    fields = _stat_fields(identity.pid)
    return fields is not None and int(fields[19]) == identity.start_ticks and fields[0] not in {"Z", "X"}


def kill_identity(identity: Identity, mark: str, number: int = signal.SIGKILL) -> bool:
    """Send signal *number* through a pidfd if pid, start time and mark match. Return whether the signal was sent."""
    with _pidfd(identity.pid) as pidfd:
        # Checked after the pidfd was opened, so that the pid cannot be reused in between.
        if pidfd is None or not is_alive(identity) or not has_mark(identity.pid, mark):
            return False
        send_signal(pidfd, number)
        return True


@contextlib.contextmanager
def _pidfd(pid: int) -> Iterator[int | None]:
    """Yield a pidfd, or None if the pid is unused or belongs to a thread."""
    try:
        pidfd = open_pidfd(pid)
    except OSError as exc:
        # EINVAL: older kernels, for a thread.
        if not (isinstance(exc, ProcessLookupError | FileNotFoundError) or exc.errno == errno.EINVAL):
            raise
        yield None
    else:
        with closing_fd(pidfd):
            yield pidfd


def wait_gone(identity: Identity, timeout_s: float) -> bool:
    """Wait at most *timeout_s* until a process has ended. Return whether it has ended."""
    with _pidfd(identity.pid) as pidfd:
        return pidfd is None or not is_alive(identity) or wait_readable(pidfd, timeout_s)


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """A child process to start. The caller owns the descriptors and keeps them open until the child has started.

    stdio_fd: the child's standard input and output; None stands for /dev/null. stdout_fd: for another output.
    env: None sets only PATH and LC_ALL.
    """

    argv: list[str]
    pass_fds: tuple[int, ...]
    stderr_fd: int
    stdio_fd: int | None = None
    stdout_fd: int | None = None
    env: dict[str, str] | None = None


_lock = threading.Lock()
_thread: threading.Thread | None = None
_requests: _Requests  # of that thread


def need_exit_statuses() -> None:
    """Raise HostError if this process ignores SIGCHLD: the kernel then discards the exit status of its children."""
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        why = "SIGCHLD is ignored, so the exit status of the VM would be lost"
        fix = "Restore its default: signal.signal(signal.SIGCHLD, signal.SIG_DFL)"
        raise HostError("cannot start a virtual machine", why, fix)


def launch(request: Launch) -> subprocess.Popen[bytes]:
    """Start a child process from the launcher thread. Raises HostError, or OSError if the program cannot be started."""
    import queue

    need_exit_statuses()
    global _thread, _requests  # noqa: PLW0603 - one thread per process
    with _lock:
        if _thread is None or not _thread.is_alive():  # no thread survives a fork
            _requests = queue.SimpleQueue()
            thread = threading.Thread(target=_serve, args=(_requests,), name="x07-launcher", daemon=True)
            _thread = start_thread(thread)
        requests = _requests
    answer: _Answer = queue.SimpleQueue()
    requests.put((request, answer))
    child = answer.get()
    if isinstance(child, OSError):
        raise child
    return child


def _serve(requests: _Requests) -> None:
    import subprocess

    # Children inherit this thread's signal mask. If SIGALRM were blocked, the timer of their deadline would do nothing.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    while True:
        request, answer = requests.get()
        stdin = subprocess.DEVNULL if request.stdio_fd is None else request.stdio_fd
        try:
            with close_on_fork.no_fork():
                child: subprocess.Popen[bytes] | OSError = subprocess.Popen(
                    request.argv,
                    stdin=stdin,
                    stdout=stdin if request.stdout_fd is None else request.stdout_fd,
                    stderr=request.stderr_fd,
                    pass_fds=request.pass_fds,
                    env=COMMAND_ENVIRONMENT if request.env is None else request.env,
                    cwd="/",
                    start_new_session=True,
                )
        except OSError as exc:
            child = exc
        answer.put(child)


def start_in_background(
    module: str,
    *words: str,
    ready_fd: int | None = None,
    errors: IO[bytes],
    stdin: int | None = None,
    cwd: str | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Run *module* in a session of its own, isolated from this user's Python settings. Raises OSError.

    The process inherits *ready_fd*, if there is one; its number is the last argument. errors: its standard error.
    stdin: see subprocess.Popen; None stands for no input. env: None for `inherited_environment`.
    """
    import subprocess

    ready = [] if ready_fd is None else [ready_fd]
    with close_on_fork.no_fork():
        return subprocess.Popen(
            [sys.executable, "-I", "-m", module, *words, *map(str, ready)],
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=ready,
            start_new_session=True,
            cwd=cwd,
            env=inherited_environment() if env is None else env,
        )


def reap_later(child: subprocess.Popen[bytes]) -> None:
    """Reap *child* once it has ended, in a thread. Raises OSError if no thread can be started."""
    start_thread(threading.Thread(target=child.wait, name="x07-reaper", daemon=True))
