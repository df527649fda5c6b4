"""Limits on the process of a virtual machine, and its control groups."""

from __future__ import annotations

import contextlib
import math
import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING, Final

from x07_sandbox.errors import BackendError
from x07_sandbox.host import settings

if TYPE_CHECKING:
    from x07_sandbox.jail.cgroups import HostGroups

_AS_ABOVE_RAM: Final = 3 * settings.GIB  # code, thread stacks, and the translator's buffer of 1 GiB
# What QEMU may use beside the guest's RAM: code, heap and thread stacks, and the translator's buffer of up to 1 GiB.
# Measured: 22 MiB of a clone that waits, 290 MiB after much work of compilers, guest included.
VMM_BYTES: Final = 1536 * settings.MIB
# QEMU's own threads, up to 64 workers of its block layer (thread-pool-max) when a guest has as many requests under
# way, and bubblewrap's first process: with less, a busy guest ends QEMU ("pthread_create failed").
TASKS: Final = 96
# Which limits are not zero, as a shell calls them, and in which unit.
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
    """No machine came to be: the host's doing, or the caller's limits. It says nothing of what it would have run."""


def limits_of(ram_bytes: int, *, namespaces: bool) -> Limits:
    """(soft, hard) of each limit. Raises NotStartedError where this shell's own are lower."""
    most = {
        resource.RLIMIT_FSIZE: settings.SCRATCH_BYTES,
        resource.RLIMIT_AS: ram_bytes + _AS_ABOVE_RAM,
        resource.RLIMIT_DATA: ram_bytes + _AS_ABOVE_RAM,  # the guest's RAM is such memory
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        # These two are counted for all processes of a user together, in the jail or not.
        resource.RLIMIT_SIGPENDING: 64,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if os.geteuid() != 0 and not namespaces:
        # All tasks of this user count, and one more: the supervisor.
        most[resource.RLIMIT_NPROC] = int(min(_tasks_of_this_user() + 1 + TASKS, _most(resource.RLIMIT_NPROC)))
    elif not namespaces or _tasks_are_counted_apart():
        most[resource.RLIMIT_NPROC] = TASKS
    limits = {which: (value, value) for which, value in most.items()}
    soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if soft != resource.RLIM_INFINITY:  # as long as the shell allows; a second before that a signal tells of it
        limits[resource.RLIMIT_CPU] = (hard - 1 if hard > 0 else hard, hard)
    if not namespaces and any(value > _most(which) for which, value in most.items()):
        raise _cannot(limits, "Operation not permitted")
    return limits


def bound(limits: Limits, groups: HostGroups, pid: int) -> None:
    """Limits on the still blocked process: everything that it starts inherits them. Raises NotStartedError."""
    try:
        for which, values in limits.items():
            resource.prlimit(pid, which, values)
        # Before it is let go, though the kernel takes 10 to 20 ms for it: a VMM that ran meanwhile could take memory
        # that no group would ever count (tried: the test of a memory hog fails).
        groups.add(pid)
    except OSError as exc:
        if isinstance(exc, ProcessLookupError):  # it has ended: the caller knows how to ask why
            raise
        raise _cannot(limits, f"{exc.strerror or exc}") from exc


def _cannot(limits: Limits, why: str) -> NotStartedError:
    needed = [
        f"ulimit -H -{option} to {limits[which][1] // unit} or more"
        for which, option, unit in _SHELLS
        if which in limits and limits[which][1] > _most(which)
    ]
    fix = f"Raise the hard limits of this shell: {', '.join(needed) or 'ulimit -H -a shows them'}"
    return NotStartedError("cannot bound the virtual machine", why, fix)


def _most(which: int) -> float:
    """The hard limit of this process; infinite for none."""
    hard = resource.getrlimit(which)[1]
    return math.inf if hard == resource.RLIM_INFINITY else hard


def _tasks_are_counted_apart() -> bool:
    """Whether RLIMIT_NPROC counts only the jail's tasks.

    It does in a user namespace of its own (Linux 5.14), and for a uid of its own if bubblewrap runs as real root.
    """
    mapped = Path("/proc/self/uid_map").read_text(encoding="ascii").split()
    return os.geteuid() != 0 or mapped == ["0", "0", "4294967295"]


def _tasks_of_this_user() -> int:
    """How many threads this user has, as far as /proc shows them."""
    total, owner = 0, f"\nUid:\t{os.getuid()}\t"
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended
                told = Path(entry.path, "status").read_text(encoding="utf-8", errors="replace")
                if owner in told:
                    total += int(told.partition("\nThreads:\t")[2].partition("\n")[0])
    return total
