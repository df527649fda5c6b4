"""Processes by identity: a number is reused, a number with its start time and boot is not."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from functools import cache
from pathlib import Path

import msgspec

from x07_sandbox.errors import HostError
from x07_sandbox.host.poll import wait_readable


@cache
def boot_id() -> str:
    """Which boot of the kernel it is (random(4): /proc/sys/kernel/random/boot_id). Raises HostError."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError as exc:
        from x07_sandbox.host.os_errors import require_own_proc

        require_own_proc()
        why = f"{exc.filename}: {exc.strerror}"
        fix = "Mount a whole /proc, without subset=pid (in a unit of systemd: ProcSubset=all)"
        raise HostError("cannot tell which boot of this host it is", why, fix) from exc


def pid_namespace() -> str:
    """The pid namespace in which our numbers mean something."""
    return str(Path("/proc/self/ns/pid").readlink())


def sees_every_process() -> bool:
    """Whether our pid namespace is the first one of this boot, in which every process has a number."""
    return pid_namespace() == "pid:[4026531836]"  # linux/proc_ns.h: PROC_PID_INIT_INO


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """One process of one boot. start_ticks: field 22 of proc(5) stat, clock ticks since boot."""

    pid: int
    start_ticks: int


def identify(pid: int) -> Identity | None:
    """The identity of a live process; None when there is none of that number."""
    fields = _stat_fields(pid)
    return None if fields is None else Identity(pid=pid, start_ticks=int(fields[19]))


def own_identity() -> Identity:
    """The identity of this process. Raises HostError where /proc does not show it."""
    found = identify(os.getpid())
    if found is None:
        raise HostError("cannot record the job", "/proc does not show this process", "Mount /proc here")
    return found


def children_of(pid: int) -> list[int]:
    """The children of a process of one thread (proc(5): /proc/PID/task/TID/children)."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _stat_fields(pid: int) -> list[str] | None:
    """Fields 3 and up of /proc/PID/stat: the name before them may hold anything."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()


def has_mark(pid: int, mark: str) -> bool:
    """Whether a process has *mark*, which only our launcher sets, among its arguments. No mark is no proof."""
    try:
        return bool(mark) and mark.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def processes_with_mark(mark: str) -> list[Identity]:
    """Every process that carries *mark* among its arguments, as far as /proc shows them; never this one."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(PermissionError):  # somebody else's, where /proc hides them
                if has_mark(int(entry.name), mark) and (identity := identify(int(entry.name))) is not None:
                    found.append(identity)
    return found


def is_alive(identity: Identity) -> bool:
    """Whether that very process still exists and is no zombie."""
    fields = _stat_fields(identity.pid)
    return fields is not None and int(fields[19]) == identity.start_ticks and fields[0] not in {"Z", "X"}


def kill_identity(identity: Identity, mark: str, number: int = signal.SIGKILL) -> bool:
    """Signal that very process, through a pidfd, if its pid, start time and mark agree; whether it was signalled."""
    pidfd = _pidfd(identity.pid)
    if pidfd is None:
        return False
    try:
        # Checked after the pidfd is held: from here on the number cannot come to mean another process.
        if not is_alive(identity) or not has_mark(identity.pid, mark):
            return False
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, number)
        return True
    finally:
        os.close(pidfd)


def _pidfd(pid: int) -> int | None:
    """A descriptor of the process; None when the number is nobody's, or has come to be a mere thread's."""
    try:
        return os.pidfd_open(pid)
    except (ProcessLookupError, FileNotFoundError):
        return None
    except OSError as exc:
        if exc.errno == errno.EINVAL:  # how older kernels say that it is a thread
            return None
        raise


def wait_gone(identity: Identity, timeout_s: float) -> bool:
    """Wait until that process has ended, at most *timeout_s*; whether it has."""
    pidfd = _pidfd(identity.pid)
    if pidfd is None:
        return True
    try:
        if not is_alive(identity):
            return True
        return wait_readable(pidfd, timeout_s)
    finally:
        os.close(pidfd)
