"""A running QEMU in its jail."""

import contextlib
import os
import subprocess
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from x07_sandbox.backends.base import Greeting, Lease, StartMode
from x07_sandbox.backends.jailed import BoundedStream, Jailed, RunningAgent, Start
from x07_sandbox.backends.qemu.bounds import VMM_BYTES
from x07_sandbox.backends.qemu.machine import QMP_CONTINUE, QMP_QUIT, Paths, qmp_resume
from x07_sandbox.errors import BackendError
from x07_sandbox.host import close_on_fork, settings
from x07_sandbox.host.os_errors import raised_as
from x07_sandbox.host.processes import Identity
from x07_sandbox.host.waiting import wait_readable
from x07_sandbox.jail.cgroups import HostGroups
from x07_sandbox.records.record import Claim, JobRecord, renamed_record, renewed_record

_DEADLINE_SIGNAL: Final = 40  # a real-time signal, since these are queued
_GONE_S: Final = 10.0
_ERRORS: Final = ("stderr", "jail")


class ReleasePipe:
    """The pipe through which a blocked jail gets its system call filter (`Jail.filter_fd`).

    This object owns *owned_fd*. message: takes the pid of the jail's first process, and returns the bytes to write.
    """

    def __init__(self, owned_fd: int, message: Callable[[int], bytes]) -> None:
        self.released = False
        self._fd: int | None = close_on_fork.add(owned_fd)  # a copy in a forked child would keep the jail blocked
        self._message = message

    def release(self, pid: int) -> None:
        """Release the jail, whose first process is *pid*. A second call does nothing."""
        if self._fd is not None:
            self.released = True
            with contextlib.suppress(BrokenPipeError):  # the jail has ended, which its descriptors show
                os.write(self._fd, self._message(pid))  # below PIPE_BUF, so written whole or not at all
        self.close()

    def close(self) -> None:
        """End the jail if it is still blocked. A second call does nothing."""
        if self._fd is not None:
            close_on_fork.close(self._fd)
            self._fd = None


class HostSide(NamedTuple):
    """The host's side of a QEMU process. ends: our ends of its streams, closed by `start_qemu`. paths: of its files."""

    groups: HostGroups
    release_pipe: ReleasePipe
    ends: dict[str, int]
    paths: Paths


class Streams(RunningAgent):
    """The streams of a QEMU process. The caller keeps owning the descriptors in *ends*."""

    greeting: Greeting

    def __init__(self, ends: Mapping[str, int], start_mode: StartMode) -> None:
        self.channel_fd = ends["channel"]
        self.net_fd: int | None = ends["net"]
        self.start_mode = start_mode
        self.notes: tuple[str, ...] = ()
        self.qmp = BoundedStream(ends["qmp"], keep_bytes=4096)
        self.shown = (
            BoundedStream(ends["console"], keep_bytes=settings.CONSOLE_MAX_BYTES),
            # The jail has its own while criu dumps a process.
            *(BoundedStream(ends[name], keep_bytes=settings.STDERR_MAX_BYTES) for name in _ERRORS if name in ends),
        )
        self.hidden = (self.qmp,)

    def send_qmp(self, commands: bytes) -> None:
        """Write commands to QEMU's control protocol (QMP). The replies go to `qmp`."""
        with contextlib.suppress(OSError):  # QEMU has ended, which its other streams show
            os.write(self.qmp.fd, commands)


class QemuInstance(Streams, Jailed):
    """A QEMU process that this process started. `start_qemu` starts and ends it."""

    def __init__(self, start: Start, host: HostSide, child: subprocess.Popen[bytes], inner: Identity) -> None:
        Streams.__init__(self, host.ends, start.start_mode)
        Jailed.__init__(self, start, child, inner)
        self.groups = host.groups
        self.ends = host.ends
        self.paths = host.paths
        self._release_pipe = host.release_pipe

    def release(self) -> None:
        """Let the VM run, once its record is written. A second call does nothing."""
        if self._release_pipe.released or self.child.poll() is not None:
            return  # never release a jail whose supervisor has ended: nothing would stop it
        if self.start_mode == "clone":
            self.send_qmp(qmp_resume(self.paths.state))
        elif self.start_mode == "hot":
            self.send_qmp(QMP_CONTINUE)
        self._release_pipe.release(self.inner.pid)

    def adopt(self, claim: Claim, runner: Identity, ram_bytes: int) -> None:
        """Turn a waiting VM into the job in *claim*, which uses at most *ram_bytes* of RAM. Raises SandboxError."""
        # If this fails halfway, the record names the processes and an owner that is dead by then.
        self.set_deadline(claim.deadline_s)
        with raised_as(BackendError, "cannot limit the VM's memory", "Try again"):
            self.groups.limit_memory(ram_bytes + VMM_BYTES)
        self.record = renewed_record(self.record, claim)
        self.record_owner(runner)
        self.record = renamed_record(self.record)

    def set_deadline(self, seconds: int) -> None:
        """Set the supervisor's deadline, with a signal that carries a value (jail/data/supervisor.pl)."""
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        if libc.sigqueue(self.child.pid, _DEADLINE_SIGNAL, ctypes.c_void_p(seconds)):  # not reaped, so the pid is ours
            raise BackendError("cannot set the deadline", os.strerror(ctypes.get_errno()), "Try again")

    def quit_gracefully(self) -> bool:
        """Ask QEMU to quit and return whether it has."""
        self.send_qmp(QMP_QUIT)
        return self._release_pipe.released and wait_readable(self.pidfd, 0.05)


class LeasedInstance(Streams):
    """A VM that the pool's process started and this process uses. This process owns the descriptors."""

    def __init__(self, lease: Lease, record: JobRecord, jail: str, owned_fds: Mapping[str, int]) -> None:
        super().__init__(owned_fds, "pool")
        self.jail = jail
        self.record = record
        self.pidfd = owned_fds["supervisor"]
        self._inner_pidfd = owned_fds["inner"]
        self._lease = lease
        self._gone: bool | None = None

    def exit_status(self) -> int | None:
        """Return the VM's exit status as reported by the pool's process, or None while the VM runs."""
        return self._lease.exit_status()

    def stop(self) -> bool:
        """Ask QEMU to quit, end the lease, and return whether everything is proven gone."""
        if self._gone is None:
            if self.exit_status() is None:
                self.send_qmp(QMP_QUIT)
            self._gone = self._lease.end_lease() and wait_readable(self._inner_pidfd, _GONE_S)
        return self._gone
