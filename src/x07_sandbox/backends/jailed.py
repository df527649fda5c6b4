"""A job's processes below a supervisor (jail/data/supervisor.pl): starting, recording, stopping, proving them gone."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple, TypeVar

from x07_sandbox.backends.base import Greeting, StartMode
from x07_sandbox.errors import BackendError, HostError, escaped
from x07_sandbox.host import settings
from x07_sandbox.host.linux import children_of, open_pidfd, send_signal
from x07_sandbox.host.paths import closing_fd
from x07_sandbox.host.processes import FdGroup, Identity, Launch, identify, launch, own_identity, wait_gone
from x07_sandbox.host.waiting import Deadline, wait_readable
from x07_sandbox.records.runs import JobRecord, mark_done, write_owner

_J = TypeVar("_J", bound="Jailed")
_SETUP_S: Final = 10.0
_LOOK_AGAIN_S: Final = 0.001  # a look takes about a tenth of it
_CHUNK: Final = 64 * 1024
_GONE_S: Final = 10.0


def socket_ends(stack: contextlib.ExitStack, given: FdGroup) -> tuple[int, int]:
    """Make a socket pair. Return our non-blocking end, closed by *stack*, and a child's end, closed by *given*."""
    near, far = socket.socketpair()
    fd = near.detach()
    stack.callback(os.close, fd)
    os.set_blocking(fd, False)
    return fd, given.add(far.detach())


class Ends:
    """The streams of one agent: x07's ends, which *stack* closes, and the child's ends, which `given` closes.

    network: whether the relay has a stream of its own.
    """

    def __init__(self, stack: contextlib.ExitStack, *, network: bool = False) -> None:
        self.given = FdGroup()
        stack.callback(self.given.close)
        self.channel_fd, self.far_fd = socket_ends(stack, self.given)
        self.net_fd: int | None = None
        self.far_net_fd: int | None = None
        if network:
            self.net_fd, self.far_net_fd = socket_ends(stack, self.given)
        fd, theirs = os.pipe()
        stack.callback(os.close, fd)
        os.set_blocking(fd, False)
        self.errors, self.stderr_fd = BoundedStream(fd, keep_bytes=settings.STDERR_MAX_BYTES), self.given.add(theirs)


class BoundedStream:
    """Keeps the last bytes of a stream, which may be hostile, from a non-blocking descriptor that the caller owns."""

    def __init__(self, fd: int, *, keep_bytes: int) -> None:
        self.fd = fd
        self.ended = False
        self.total_bytes = 0
        self._keep_bytes = keep_bytes
        self._kept = bytearray()

    def read(self) -> None:
        """Read one chunk, or nothing if no data is ready."""
        if self.ended:
            return
        try:
            data = os.read(self.fd, _CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.ended = True
            return
        self.total_bytes += len(data)
        self._kept += data
        del self._kept[: -self._keep_bytes]

    def text(self) -> str:
        """Return the kept text. Characters that cannot be seen are escaped, except tabs and newlines."""
        text = self._kept.decode("utf-8", "surrogateescape").replace("\r", "")
        return escaped(text, kept="\n\t")[-self._keep_bytes :]


class RunningAgent:
    """An instance whose agent already waits for its first frame. Its streams beside the channel have size limits.

    shown: the streams whose text is the console output. hidden: others. See `Instance` for the rest.
    """

    channel_fd: int
    net_fd: int | None = None
    notes: tuple[str, ...] = ()
    greeting: Greeting
    start_mode: StartMode = "cold"
    shown: tuple[BoundedStream, ...]
    hidden: tuple[BoundedStream, ...] = ()

    def release(self) -> None:
        """Do nothing, since the agent runs already."""

    def side_fds(self) -> tuple[int, ...]:
        """Return the descriptors of the streams that have not ended."""
        return tuple(stream.fd for stream in (*self.shown, *self.hidden) if not stream.ended)

    def drain(self, fd: int) -> None:
        """Read one of the `side_fds`, within its size limit."""
        for stream in (*self.shown, *self.hidden):
            if stream.fd == fd:
                stream.read()

    def console_tail(self) -> str:
        """Return the end of the console output, escaped as by `BoundedStream.text`."""
        for stream in self.shown:
            stream.read()
        return "".join(stream.text() for stream in self.shown)


class Start(NamedTuple):
    """The description of a job to start.

    jail: the confinement, as text for the record. given: descriptors to close once the child has them. depth: see
    `inner_process`; 0 if the child is the whole job. remove: removes what outlives the processes (control groups,
    folders), and returns whether all is gone. bound: sets limits on the first process, by pid, while that process is
    blocked. name, error: for messages.
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
    """Launch and record a job, and yield its instance. Raises BackendError, HostError.

    When the context ends, the job is gone and recorded as gone. make: makes the instance. not_built: makes the error
    for a supervisor that ended early, from its exit status.
    """
    child = instance = None
    gone = False
    try:
        # Without processes for now: if this process is killed, the sweep finds what it left by the record's mark.
        runner = own_identity()
        write_owner(start.record, runner=runner, processes={}, cgroups=start.cgroups)
        try:
            child = launch(request)
        except OSError as exc:
            why = f"{exc.strerror} ({request.argv[0]})"
            raise start.error(f"cannot start {start.name}", why, "Run x07 doctor") from exc
        start.given.close()  # else our copies would keep the child's pipes open
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
            with contextlib.suppress(HostError):  # on a full disk the sweep records it later
                mark_done(start.record if instance is None else instance.record)


def inner_process(child: subprocess.Popen[bytes], depth: int) -> Identity:
    """Return the process *depth* generations below the supervisor once it exists. Raises ProcessLookupError."""
    # Found in /proc, since bubblewrap's --info-fd reports numbers of its own pid namespace.
    deadline = Deadline.after(_SETUP_S)
    with closing_fd(open_pidfd(child.pid)) as pidfd:
        late = False
        while not late:
            late = deadline.passed()  # then look once more: this process may have been stopped
            found = [child.pid]
            for _ in range(depth):
                found = [below for pid in found for below in children_of(pid)]
            for pid in found:
                if (inner := identify(pid)) is not None:
                    return inner
            if wait_readable(pidfd, _LOOK_AGAIN_S):  # there is no event for another process's child
                break
    raise ProcessLookupError


def _end_supervisor(child: subprocess.Popen[bytes]) -> None:
    """End a supervisor that has no instance. Its processes are killed with it."""
    child.terminate()
    try:
        child.wait(_SETUP_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


class Jailed:
    """A supervisor, and the first process of its job. All other processes of the job end with that process."""

    def __init__(self, start: Start, child: subprocess.Popen[bytes], inner: Identity) -> None:
        self.child = child
        self.record = start.record
        self.jail = start.jail
        self.start_mode = start.start_mode
        self.inner = inner
        self.gone = False
        self._closed = False
        self._start = start
        self.supervisor = identify(child.pid)
        self.inner_pidfd = open_pidfd(inner.pid)  # first, since it may fail: this process may be gone
        self.pidfd = open_pidfd(child.pid)

    def record_owner(self, runner: Identity) -> None:
        """Record the job's processes, and *runner* as the job's x07 process. Raises BackendError, HostError."""
        if self.supervisor is None:
            raise BackendError("cannot record the job", "its processes exited immediately", "Run x07 doctor")
        processes = (
            {"supervisor": self.supervisor, "inner": self.inner} if self._start.depth else {"helper": self.inner}
        )
        write_owner(self.record, runner=runner, processes=processes, cgroups=self._start.cgroups)

    def exit_status(self) -> int | None:
        """Return the exit status of the supervisor, which is that of its command."""
        return self.child.poll()

    def end_at_once(self) -> bool:
        """End the job in the quickest way, if there is one. Return whether it has ended."""
        return False

    def stop(self) -> bool:
        """End the job, clean up, and return whether all is proven gone. May be called again."""
        if self.gone or self._closed:
            return self.gone
        if not self.end_at_once():
            send_signal(self.pidfd, signal.SIGTERM)
        deadline = Deadline.after(_GONE_S)
        try:
            self.child.wait(_GONE_S / 2)
        except subprocess.TimeoutExpired:  # for instance a supervisor under SIGSTOP
            for pidfd in (self.inner_pidfd, self.pidfd):
                send_signal(pidfd, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(deadline.left_s())
        # The proof: the kernel reaps the first process of a pid namespace after all others.
        gone = self.child.returncode is not None and wait_gone(self.inner, deadline.left_s())
        self.gone = gone and self._start.remove()
        return self.gone

    def close(self) -> None:
        """Close the descriptors of the job's processes."""
        self._closed = True
        os.close(self.pidfd)
        os.close(self.inner_pidfd)


class StreamInstance(RunningAgent, Jailed):
    """A job whose agent is reached through streams of its process, and whose console is that process's stderr."""

    def __init__(self, start: Start, ends: Ends, child: subprocess.Popen[bytes], inner: Identity) -> None:
        super().__init__(start, child, inner)
        self.channel_fd = ends.channel_fd
        self.net_fd = ends.net_fd
        self.shown = (ends.errors,)
