"""Processes identified by pid, start time and boot, since a pid alone is reused.

A mark is a random text that x07 puts into the arguments of a job's processes, to recognize them later.
"""

import contextlib
import errno
import os
import signal
from functools import cache
from pathlib import Path
from typing import Annotated

import msgspec

from x07_sandbox.errors import HostError
from x07_sandbox.host.poll import wait_readable


@cache
def boot_id() -> str:
    """Return the id of this boot (random(4): boot_id). Raises HostError if /proc does not show it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError as exc:
        from x07_sandbox.host.os_errors import require_own_proc

        require_own_proc()
        why = f"{exc.strerror} ({exc.filename})"
        fix = "Mount /proc without subset=pid (in a systemd unit: ProcSubset=all)"
        raise HostError("cannot identify this boot", why, fix) from exc


def pid_namespace() -> str:
    """Return this process's pid namespace."""
    return str(Path("/proc/self/ns/pid").readlink())


def sees_every_process() -> bool:
    """Return whether this is the initial pid namespace, in which every process is visible."""
    return pid_namespace() == "pid:[4026531836]"  # linux/proc_ns.h: PROC_PID_INIT_INO


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


def own_identity() -> Identity:
    """Return the identity of this process. Raises HostError if /proc does not show it."""
    found = identify(os.getpid())
    if found is None:
        raise HostError("cannot record the job", "/proc does not show this process", "Mount /proc here")
    return found


def children_of(pid: int) -> list[int]:
    """Return the children of a single-threaded process (proc(5): /proc/PID/task/TID/children)."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _stat_fields(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat after the command name, which may contain any characters."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()


def has_mark(pid: int, mark: str) -> bool:
    """Return whether *mark* is not empty and is in the arguments of a process. Only our launcher sets marks."""
    try:
        return bool(mark) and mark.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def processes_with_mark(mark: str) -> list[Identity]:
    """Return every other visible process that has *mark* in its arguments."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(PermissionError):  # another user's, with hidepid
                if has_mark(int(entry.name), mark) and (identity := identify(int(entry.name))) is not None:
                    found.append(identity)
    return found


def is_alive(identity: Identity) -> bool:
    """Return whether the process still exists and is not a zombie."""
    fields = _stat_fields(identity.pid)
    return fields is not None and int(fields[19]) == identity.start_ticks and fields[0] not in {"Z", "X"}


def kill_identity(identity: Identity, mark: str, number: int = signal.SIGKILL) -> bool:
    """Send signal *number* through a pidfd if pid, start time and mark match. Return whether the signal was sent."""
    pidfd = _pidfd(identity.pid)
    if pidfd is None:
        return False
    try:
        # Checked after the pidfd was opened, so that the pid cannot be reused in between.
        if not is_alive(identity) or not has_mark(identity.pid, mark):
            return False
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, number)
        return True
    finally:
        os.close(pidfd)


def _pidfd(pid: int) -> int | None:
    """Return a pidfd, or None if the pid is unused or belongs to a thread."""
    try:
        return os.pidfd_open(pid)
    except (ProcessLookupError, FileNotFoundError):
        return None
    except OSError as exc:
        if exc.errno == errno.EINVAL:  # older kernels, for a thread
            return None
        raise


def wait_gone(identity: Identity, timeout_s: float) -> bool:
    """Wait at most *timeout_s* until a process has ended. Return whether it has ended."""
    pidfd = _pidfd(identity.pid)
    if pidfd is None:
        return True
    try:
        if not is_alive(identity):
            return True
        return wait_readable(pidfd, timeout_s)
    finally:
        os.close(pidfd)
