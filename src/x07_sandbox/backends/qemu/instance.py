"""A QEMU in its jail, from its release to the proof that it is gone."""

from __future__ import annotations

import contextlib
import os
import subprocess
from typing import TYPE_CHECKING, Final, NamedTuple

from x07_sandbox.backends.jailed import Jailed
from x07_sandbox.backends.qemu.bounds import VMM_BYTES
from x07_sandbox.backends.qemu.machine import qmp_quit, qmp_resume
from x07_sandbox.errors import BackendError
from x07_sandbox.host import close_on_fork, settings
from x07_sandbox.host.bounded_stream import BoundedStream
from x07_sandbox.host.poll import wait_readable
from x07_sandbox.jobs.record import renamed_record, renewed_record

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from x07_sandbox.backends.base import Greeting, Lease, StartMode
    from x07_sandbox.backends.jailed import Start
    from x07_sandbox.backends.qemu.machine import Paths
    from x07_sandbox.host.processes import Identity
    from x07_sandbox.jail.cgroups import HostGroups
    from x07_sandbox.jobs.record import Claim, JobRecord

_DEADLINE_SIGNAL: Final = 40  # a real-time signal: those queue
_GONE_S: Final = 10.0


class Gate:
    """Where a jail waits to be let go, for its filter of system calls: see `Jail.filter_fd`. Owns the descriptor.

    message: what is written there, by the number of the jail's first process.
    """

    def __init__(self, owned_fd: int, message: Callable[[int], bytes]) -> None:
        self.opened = False
        self._fd: int | None = close_on_fork.add(owned_fd)  # in a forked child it would hold the gate shut
        self._message = message

    def open(self, pid: int) -> None:
        """Let it go, whose first process is *pid*. A second call does nothing."""
        if self._fd is not None:
            self.opened = True
            with contextlib.suppress(BrokenPipeError):  # it has ended: its descriptors tell
                os.write(self._fd, self._message(pid))  # less than a pipe takes at once (pipe(7)): whole or not at all
        self.close()

    def close(self) -> None:
        """Shut it for good: what still waits ends. A second call does nothing."""
        if self._fd is not None:
            close_on_fork.close(self._fd)
            self._fd = None


class Held(NamedTuple):
    """What its starter has of a QEMU. ends: of its streams, lent. paths: where it opens its files."""

    groups: HostGroups
    gate: Gate
    ends: dict[str, int]
    paths: Paths


class Streams:
    """What a QEMU says and is told, whoever started it. The descriptors in *ends* are lent."""

    greeting: Greeting

    def __init__(self, ends: Mapping[str, int], start_mode: StartMode) -> None:
        self.channel_fd = ends["channel"]
        self.net_fd: int | None = ends["net"]
        self.start_mode = start_mode
        self.notes: tuple[str, ...] = ()
        self._qmp_fd = ends["qmp"]
        self.console = BoundedStream(ends["console"], keep_bytes=settings.CONSOLE_MAX_BYTES)
        self.qmp = BoundedStream(ends["qmp"], keep_bytes=4096)
        self.errors = BoundedStream(ends["stderr"], keep_bytes=settings.STDERR_MAX_BYTES)
        self._side = {stream.fd: stream for stream in (self.console, self.qmp, self.errors)}

    def tell(self, commands: bytes) -> None:
        """Write to QMP; what it answers is in `qmp`."""
        with contextlib.suppress(OSError):  # it has ended, as its other streams tell
            os.write(self._qmp_fd, commands)

    def side_fds(self) -> tuple[int, ...]:
        """Console, QMP replies and the VMM's own messages."""
        return tuple(fd for fd, stream in self._side.items() if not stream.ended)

    def drain(self, fd: int) -> None:
        """Read one of them, keeping no more than its bound."""
        self._side[fd].read()

    def console_tail(self) -> str:
        """The last of the console and of the VMM's messages, control characters replaced."""
        for stream in self._side.values():
            stream.read()
        return self.console.text() + self.errors.text()


class QemuInstance(Streams, Jailed):
    """A QEMU in its jail. Made by `start_qemu`, which also ends it."""

    def __init__(self, start: Start, held: Held, child: subprocess.Popen[bytes], inner: Identity) -> None:
        Streams.__init__(self, held.ends, start.start_mode)
        Jailed.__init__(self, child, inner, start.record, start.remove, start.cgroups)
        self.jail = start.jail
        self.groups = held.groups
        self.ends = held.ends
        self.paths = held.paths
        self._gate = held.gate

    def release(self) -> None:
        """Let the machine run: its record is written. A second call does nothing."""
        if self._gate.opened or self.child.poll() is not None:
            return  # its deadline came first, and nothing would end what is let go now
        if self.start_mode == "clone":
            self.tell(qmp_resume(self.paths.state))
        self._gate.open(self.inner.pid)

    def adopt(self, claim: Claim, runner: Identity, ram_bytes: int) -> None:
        """Make a machine that waited the job of *claim*, which *runner* carries out. Raises HostError, BackendError.

        ram_bytes: the most of its RAM that this job uses.
        """
        # A failure in between leaves a record that names its processes and an owner that is dead by then.
        self.set_deadline(claim.deadline_s)
        try:
            self.groups.limit_memory(ram_bytes + VMM_BYTES)
        except OSError as exc:
            raise BackendError("cannot limit the machine's memory", exc.strerror or str(exc), "Try again") from exc
        self.record = renewed_record(self.record, claim)
        self.record_owner(runner)
        self.record = renamed_record(self.record)

    def set_deadline(self, seconds: int) -> None:
        """Give the supervisor another deadline: it takes a signal with a value (jail/data/supervisor.pl)."""
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        if libc.sigqueue(self.child.pid, _DEADLINE_SIGNAL, ctypes.c_void_p(seconds)):  # unreaped: surely ours
            raise BackendError("cannot set the deadline", os.strerror(ctypes.get_errno()), "Try again")

    def ends_when_asked(self) -> bool:
        """Ask QEMU to quit; whether it has."""
        self.tell(qmp_quit())
        return self._gate.opened and wait_readable(self.pidfd, 0.05)


class LeasedInstance(Streams):
    """A machine that the pool's process started and still watches; its descriptors are ours."""

    def __init__(self, lease: Lease, record: JobRecord, jail: str, owned_fds: Mapping[str, int]) -> None:
        super().__init__(owned_fds, "pool")
        self.jail = jail
        self.record = record
        self.pidfd = owned_fds["supervisor"]
        self._inner_pidfd = owned_fds["inner"]
        self._lease = lease
        self._gone: bool | None = None

    def release(self) -> None:
        """It runs already."""

    def exit_status(self) -> int | None:
        """How the machine's process ended: its parent tells, once it has."""
        return self._lease.exit_status()

    def stop(self) -> bool:
        """Ask QEMU to quit, give the machine back; whether all is proven gone."""
        if self._gone is None:
            if self.exit_status() is None:
                self.tell(qmp_quit())
            self._gone = self._lease.give_back() and wait_readable(self._inner_pidfd, _GONE_S)
        return self._gone
