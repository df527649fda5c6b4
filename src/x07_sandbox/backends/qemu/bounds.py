"""Resource limits on a virtual machine's process."""

import contextlib
import math
import os
import resource
from pathlib import Path
from typing import Final

from x07_sandbox.errors import BackendError
from x07_sandbox.host import settings
from x07_sandbox.jail.cgroups import HostGroups

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
