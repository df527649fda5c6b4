"""A running QEMU in its jail: its streams, its resource limits, and its end."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from x07_sandbox.backends.base import StartMode
from x07_sandbox.backends.jailed import BoundedStream, Jailed, RunningAgent, Start
from x07_sandbox.backends.qemu.machine import QMP_CONTINUE, Paths, qmp_resume
from x07_sandbox.errors import BackendError
from x07_sandbox.host import settings
from x07_sandbox.host.linux import pid_of, send_signal
from x07_sandbox.host.paths import raised_as
from x07_sandbox.host.processes import Identity, close_on_fork
from x07_sandbox.host.waiting import wait_readable
from x07_sandbox.jail.resources import HostGroups
from x07_sandbox.records.runs import Claim, JobRecord, renamed_record, renewed_record

if TYPE_CHECKING:
    from x07_sandbox.backends.lease import Over

_DEADLINE_SIGNAL: Final = 40  # a real-time signal, since these are queued
_GONE_S: Final = 10.0
_ERRORS: Final = ("stderr", "jail")


_AS_ABOVE_RAM: Final = 3 * settings.GIB  # code, thread stacks, and the translator's buffer of 1 GiB
# Memory of QEMU beside the guest's RAM: code, heap, thread stacks, and the translator's buffer of up to 1 GiB.
# Measured: 22 MiB for a waiting clone, 290 MiB after long compiler runs, guest included.
VMM_BYTES: Final = 1536 * settings.MIB
# QEMU's threads, including up to 64 block workers (thread-pool-max), and bubblewrap's first process: with fewer, a busy
# guest ends QEMU ("pthread_create failed").
TASKS: Final = 96
# The limits that are not zero: the letter of ulimit, and its unit.
_SHELLS: Final = (
    (resource.RLIMIT_FSIZE, "f", 1024),
    (resource.RLIMIT_AS, "v", 1024),
    (resource.RLIMIT_DATA, "d", 1024),
    (resource.RLIMIT_NOFILE, "n", 1),
    (resource.RLIMIT_SIGPENDING, "i", 1),
    (resource.RLIMIT_NPROC, "u", 1),
)

Limits = dict[int, tuple[int, int]]


class NotStartedError(BackendError):
    """The virtual machine could not be started. The cause is the host or the caller's limits, not the VM's files."""


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
    """The host's side of a QEMU process. ends: our ends of its streams, and two files. paths: of its files.

    `start_qemu` closes the ends. disk: closes our descriptor of the scratch disk, which takes space until then.
    """

    groups: HostGroups
    release_pipe: ReleasePipe
    ends: dict[str, int]
    paths: Paths
    disk: contextlib.ExitStack


class Streams(RunningAgent):
    """The streams of a QEMU process. The caller keeps owning the descriptors in *ends*.

    inner_pid: the first process in the jail, which is above QEMU or is QEMU.
    """

    pidfd: int
    inner_pid: int

    def __init__(self, ends: Mapping[str, int], start_mode: StartMode) -> None:
        self.channel_fd = ends["channel"]
        self.net_fd = ends["net"]
        self.ram_fd = ends.get("ram")  # the file of which the RAM is a private mapping
        self.scratch_fd = ends.get("scratch")
        self.start_mode = start_mode
        self.qmp = BoundedStream(ends["qmp"], keep_bytes=4096)
        self.shown = (
            BoundedStream(ends["console"], keep_bytes=settings.CONSOLE_MAX_BYTES),
            # The jail has its own while criu dumps a process.
            *(BoundedStream(ends[name], keep_bytes=settings.STDERR_MAX_BYTES) for name in _ERRORS if name in ends),
        )
        self.hidden = (self.qmp,)

    def send_qmp(self, commands: bytes, fds: tuple[int, ...] = ()) -> None:
        """Write commands, and descriptors, to QEMU's control protocol (QMP). The replies go to `qmp`."""
        with contextlib.suppress(OSError):  # QEMU has ended, which its other streams show
            if not fds:
                os.write(self.qmp.fd, commands)
                return
            with socket.socket(fileno=os.dup(self.qmp.fd)) as control:
                socket.send_fds(control, [commands], fds)


class QemuInstance(Streams, Jailed):
    """A QEMU process that this process started. `start_qemu` starts and ends it."""

    def __init__(self, start: Start, host: HostSide, child: subprocess.Popen[bytes], inner: Identity) -> None:
        Streams.__init__(self, host.ends, start.start_mode)
        Jailed.__init__(self, start, child, inner)
        self.inner_pid = inner.pid
        self.groups = host.groups
        self.ends = host.ends
        self.paths = host.paths
        self._release_pipe = host.release_pipe
        self._disk = host.disk

    def close(self) -> None:
        """Close the descriptors of the job's processes, and its disk."""
        super().close()
        self._disk.close()

    def release(self) -> None:
        """Let the VM run, once its record is written. A second call does nothing."""
        if self._release_pipe.released or self.child.poll() is not None:
            return  # never release a jail whose supervisor has ended: nothing would stop it
        if self.start_mode in {"clone", "fork"}:
            self.send_qmp(qmp_resume(self.paths.state))
        elif self.start_mode == "hot":
            self.send_qmp(QMP_CONTINUE)
        self._release_pipe.release(self.inner.pid)

    def adopt(self, claim: Claim, runner: Identity, ram_bytes: int) -> None:
        """Turn a waiting VM into the job in *claim*, which uses at most *ram_bytes* of RAM. Raises SandboxError."""
        # If this fails halfway, the record names the processes and an owner that is dead by then.
        self.set_deadline(claim.deadline_s)
        self.limit_ram(ram_bytes)
        self.record = renewed_record(self.record, claim)
        self.record_owner(runner)
        self.record = renamed_record(self.record)

    def limit_ram(self, ram_bytes: int) -> None:
        """Limit the RAM that the VM may use. Raises BackendError."""
        with raised_as(BackendError, "cannot limit the VM's memory", "Try again"):
            self.groups.limit_memory(ram_bytes + VMM_BYTES)

    def set_deadline(self, seconds: int) -> None:
        """Set the supervisor's deadline, with a signal that carries a value (jail/data/supervisor.pl)."""
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        if libc.sigqueue(self.child.pid, _DEADLINE_SIGNAL, ctypes.c_void_p(seconds)):  # not reaped, so the pid is ours
            raise BackendError("cannot set the deadline", os.strerror(ctypes.get_errno()), "Try again")

    def end_at_once(self) -> bool:
        """Kill the first process in the jail, and so all of them. What QEMU could still write is of no use."""
        send_signal(self.inner_pidfd, signal.SIGKILL)
        return wait_readable(self.pidfd, 0.05)


class LeasedInstance(Streams):
    """A VM of the pool's process, which lets this process use it until the connection *lease* ends (backends/lease)."""

    def __init__(self, lease: socket.socket, record: JobRecord, jail: str, fds: Mapping[str, int]) -> None:
        super().__init__(fds, "pool")
        self.jail = jail
        self.record = record
        self.pidfd = fds["supervisor"]
        self._inner_pidfd = fds["inner"]
        self.inner_pid = pid_of(self._inner_pidfd)
        self._lease = lease
        self._over: Over | None = None
        self._gone = False

    def exit_status(self) -> int | None:
        """Return the VM's exit status as reported by the pool's process, or None while the VM runs."""
        if self._over is None and wait_readable(self._lease.fileno(), 0):
            self.stop()
        return None if self._over is None else self._over.status

    def stop(self) -> bool:
        """Kill QEMU, end the lease, and return whether everything is proven gone."""
        if self._over is None:
            from x07_sandbox.backends.lease import end  # few runs use a pool

            send_signal(self._inner_pidfd, signal.SIGKILL)
            self._over = end(self._lease)
            self._gone = self._over.gone and wait_readable(self._inner_pidfd, _GONE_S)
        return self._gone


def limits_of(ram_bytes: int, *, namespaces: bool) -> Limits:
    """Return QEMU's limits as (soft, hard) by RLIMIT number. Raises NotStartedError if our own limits are lower."""
    most = {
        resource.RLIMIT_FSIZE: settings.SCRATCH_BYTES,
        resource.RLIMIT_AS: ram_bytes + _AS_ABOVE_RAM,
        resource.RLIMIT_DATA: ram_bytes + _AS_ABOVE_RAM,  # includes the guest's RAM
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        # The kernel counts these two over all processes of a user, inside the jail or not.
        resource.RLIMIT_SIGPENDING: 64,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if os.geteuid() != 0 and not namespaces:
        # All tasks of this user count, and the supervisor.
        most[resource.RLIMIT_NPROC] = int(min(_tasks_of_this_user() + 1 + TASKS, hard_limit(resource.RLIMIT_NPROC)))
    elif not namespaces or _tasks_are_counted_apart():
        most[resource.RLIMIT_NPROC] = TASKS
    limits = {which: (value, value) for which, value in most.items()}
    soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if soft != resource.RLIM_INFINITY:  # one second before the shell's limit a signal makes the cause visible
        limits[resource.RLIMIT_CPU] = (hard - 1 if hard > 0 else hard, hard)
    if not namespaces and any(value > hard_limit(which) for which, value in most.items()):
        raise _not_bounded(limits, "Operation not permitted")
    return limits


def bound(limits: Limits, groups: HostGroups, pid: int) -> None:
    """Limit the process *pid*, which is still blocked. Its children inherit the limits. Raises NotStartedError."""
    try:
        for which, values in limits.items():
            resource.prlimit(pid, which, values)
        # Before the release, although the kernel takes 10 to 20 ms: memory that a VMM allocates outside of the group
        # is never counted in it (a test with a memory hog fails otherwise).
        groups.add(pid)
    except OSError as exc:
        if isinstance(exc, ProcessLookupError):  # the caller reports why it ended
            raise
        raise _not_bounded(limits, f"{exc.strerror or exc}") from exc


def _not_bounded(limits: Limits, why: str) -> NotStartedError:
    needed = [
        f"ulimit -H -{option} to {limits[which][1] // unit} or more"
        for which, option, unit in _SHELLS
        if which in limits and limits[which][1] > hard_limit(which)
    ]
    fix = f"Raise the hard limits of this shell: {', '.join(needed) or 'ulimit -H -a shows them'}"
    return NotStartedError("cannot set the limits of the virtual machine", why, fix)


def hard_limit(which: int) -> float:
    """Return this process's hard limit *which*, or infinity if there is none."""
    hard = resource.getrlimit(which)[1]
    return math.inf if hard == resource.RLIM_INFINITY else hard


def _tasks_are_counted_apart() -> bool:
    """Return whether RLIMIT_NPROC counts only the tasks in the jail, and not this user's other tasks."""
    # It does in a user namespace (Linux 5.14), and for a uid of its own if bubblewrap runs as real root.
    mapped = Path("/proc/self/uid_map").read_text(encoding="ascii").split()
    return os.geteuid() != 0 or mapped == ["0", "0", "4294967295"]


def _tasks_of_this_user() -> int:
    """Return the number of this user's threads that /proc shows."""
    total, owner = 0, f"\nUid:\t{os.getuid()}\t"
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended
                status = Path(entry.path, "status").read_text(encoding="utf-8", errors="replace")
                if owner in status:
                    total += int(status.partition("\nThreads:\t")[2].partition("\n")[0])
    return total
