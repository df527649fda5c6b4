"""A job's processes below a supervisor (jail/data/supervisor.pl): started, recorded, ended, and proven gone."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from x07_sandbox.errors import BackendError, HostError
from x07_sandbox.host import settings
from x07_sandbox.host.bounded_stream import BoundedStream
from x07_sandbox.host.clocks import Deadline
from x07_sandbox.host.poll import wait_readable
from x07_sandbox.host.processes import Identity, children_of, identify, own_identity, wait_gone
from x07_sandbox.jobs.launcher import Launch, launch
from x07_sandbox.jobs.record import mark_done, write_owner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from x07_sandbox.backends.base import StartMode
    from x07_sandbox.host.close_on_fork import FdGroup
    from x07_sandbox.jobs.record import JobRecord

_J = TypeVar("_J", bound="Jailed")
_SETUP_S: Final = 10.0
_LOOK_AGAIN_S: Final = 0.0003
_GONE_S: Final = 10.0


def socket_ends(stack: contextlib.ExitStack, given: FdGroup) -> tuple[int, int]:
    """Our end of a new stream, which does not block and which *stack* closes, and the child's."""
    near, far = socket.socketpair()
    fd = near.detach()
    stack.callback(os.close, fd)
    os.set_blocking(fd, False)
    return fd, given.add(far.detach())


def error_stream(stack: contextlib.ExitStack, given: FdGroup) -> tuple[BoundedStream, int]:
    """A child's standard error as we read it, which *stack* closes, and the child's end."""
    fd, theirs = os.pipe2(os.O_CLOEXEC)
    stack.callback(os.close, fd)
    os.set_blocking(fd, False)
    return BoundedStream(fd, keep_bytes=settings.STDERR_MAX_BYTES), given.add(theirs)


class OwnAgent:
    """What instances have in common that are no machine: the agent is ours, and what is said beside the channel."""

    _errors: BoundedStream

    def release(self) -> None:
        """Nothing: the agent is ours, and starts no program before the channel says so."""

    def side_fds(self) -> tuple[int, ...]:
        """What agent and all between it and us have to say."""
        return () if self._errors.ended else (self._errors.fd,)

    def drain(self, _fd: int) -> None:
        """Read it, keeping no more than its bound."""
        self._errors.read()

    def console_tail(self) -> str:
        """The last of that, control characters replaced."""
        self._errors.read()
        return self._errors.text()


class Start(NamedTuple):
    """What a job is started with, before it has processes.

    jail: describes what holds the job. given: closed once the child has them. depth: as in `inner_process`.
    remove, cgroups: as in `Jailed`. bound: limits the first process, by its pid, while it is still blocked.
    name, error: of what cannot be started.
    """

    record: JobRecord
    jail: str
    given: FdGroup
    depth: int
    remove: Callable[[], bool]
    cgroups: tuple[str, ...] = ()
    bound: Callable[[int], object] = lambda _pid: None
    name: str = "the process"
    error: type[BackendError] = BackendError
    start_mode: StartMode = "cold"


@contextlib.contextmanager
def running(
    start: Start,
    request: Launch,
    make: Callable[[subprocess.Popen[bytes], Identity], _J],
    not_built: Callable[[int | None], BackendError],
) -> Iterator[_J]:
    """Launch, record and yield a job; on the way out it is gone and its record says so. Raises BackendError, HostError.

    not_built: makes the error for a supervisor that ended, with this status, before the job's first process was there.
    """
    child = instance = None
    gone = False
    try:
        # First without processes: whatever is left by a runner killed from here on carries the mark that stands there.
        runner = own_identity()
        write_owner(start.record, runner=runner, processes={}, cgroups=start.cgroups)
        try:
            child = launch(request)
        except OSError as exc:
            why = f"{request.argv[0]}: {exc.strerror}"
            raise start.error(f"cannot start {start.name}", why, "Run x07 doctor") from exc
        start.given.close()  # an end of a pipe that stayed open here would never end
        try:
            inner = inner_process(child, start.depth)
            start.bound(inner.pid)
            instance = make(child, inner)
        except ProcessLookupError as exc:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(1)
            _end_supervisor(child)
            raise not_built(child.returncode) from exc
        instance.record_owner(runner)
        yield instance
    finally:
        if instance is not None:
            gone = instance.stop()
            instance.close()
        else:
            if child is not None:
                _end_supervisor(child)
            gone = start.remove()
        if gone:
            with contextlib.suppress(HostError):  # a full disk: the sweep will find that nothing is left
                mark_done(start.record if instance is None else instance.record)


def inner_process(child: subprocess.Popen[bytes], depth: int) -> Identity:
    """Wait for the process *depth* generations below the supervisor. Raises ProcessLookupError if it never comes."""
    # Looked up in /proc: bubblewrap's --info-fd would give numbers of its own pid namespace.
    deadline = Deadline.after(_SETUP_S)
    pidfd = os.pidfd_open(child.pid)
    try:
        late = False
        while not late:
            late = deadline.passed()  # one look more: it may be we who are late
            found = [child.pid]
            for _ in range(depth):
                found = [below for pid in found for below in children_of(pid)]
            for pid in found:
                if (inner := identify(pid)) is not None:
                    return inner
            if wait_readable(pidfd, 0):
                break
            time.sleep(_LOOK_AGAIN_S)  # no event tells of another process's child
    finally:
        os.close(pidfd)
    raise ProcessLookupError


def _end_supervisor(child: subprocess.Popen[bytes]) -> None:
    """End a supervisor without an instance. If it does not end its processes in time, killing it does."""
    child.terminate()
    try:
        child.wait(_SETUP_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


class Jailed:
    """A supervisor and the job's first process below it, whose end is the end of them all.

    remove: removes what outlives them (control groups, folders) and returns whether it is gone.
    cgroups: for the record.
    """

    def __init__(
        self,
        child: subprocess.Popen[bytes],
        inner: Identity,
        record: JobRecord,
        remove: Callable[[], bool],
        cgroups: tuple[str, ...],
    ) -> None:
        self.child = child
        self.record = record
        self.inner = inner
        self.gone = False
        self._closed = False
        self._remove = remove
        self._cgroups = cgroups
        self.supervisor = identify(child.pid)
        self.inner_pidfd = os.pidfd_open(inner.pid)  # may be gone, unlike the unreaped child: so it comes first
        self.pidfd = os.pidfd_open(child.pid)

    def record_owner(self, runner: Identity) -> None:
        """Write down whose job it is. Raises BackendError, HostError."""
        if self.supervisor is None:
            raise BackendError("cannot record the job", "its processes ended at once", "Run x07 doctor")
        processes = {"supervisor": self.supervisor, "inner": self.inner}
        write_owner(self.record, runner=runner, processes=processes, cgroups=self._cgroups)

    def exit_status(self) -> int | None:
        """How the supervisor ended; it passes on the status of what it started."""
        return self.child.poll()

    def ends_when_asked(self) -> bool:
        """Ask it to end by itself, where there is a way; whether it has."""
        return False

    def stop(self) -> bool:
        """Ask, kill, wait, remove what is left; whether all of it is proven gone. Safe to call again."""
        if self.gone or self._closed:
            return self.gone
        if not self.ends_when_asked():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGTERM)
        deadline = Deadline.after(_GONE_S)
        try:
            self.child.wait(_GONE_S / 2)
        except subprocess.TimeoutExpired:  # the supervisor itself is stopped, say
            for pidfd in (self.inner_pidfd, self.pidfd):
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(deadline.left_s())
        # The end of a namespace's first process is the proof: the kernel lets it go only after all others.
        gone = self.child.returncode is not None and wait_gone(self.inner, deadline.left_s())
        self.gone = gone and self._remove()
        return self.gone

    def close(self) -> None:
        """Close its descriptors."""
        self._closed = True
        os.close(self.pidfd)
        os.close(self.inner_pidfd)
