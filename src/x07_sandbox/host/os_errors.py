"""Errors of the operating system that are a host's state and no bug of ours."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final

from x07_sandbox.errors import HostError

_ODD: Final = "Remove it: x07 makes its own"
_FIXES: Final = {
    errno.EISDIR: _ODD,
    errno.ENOTDIR: _ODD,
    errno.ELOOP: _ODD,
    errno.EMFILE: "Raise the limit on open files: ulimit -n",
    errno.ENFILE: "Close programs: the whole system has no descriptor left",
    errno.EFBIG: "Raise the limit on the size of files: ulimit -f",
    errno.ENOSPC: "Free space there, or set X07_VM_STATE_DIR and X07_VM_CACHE_DIR",
    errno.EDQUOT: "Free space there, or set X07_VM_STATE_DIR and X07_VM_CACHE_DIR",
    errno.EROFS: "Set X07_VM_STATE_DIR and X07_VM_CACHE_DIR to folders that can be written",
    errno.EACCES: "Make it yours with mode 0700, or set X07_VM_STATE_DIR and X07_VM_CACHE_DIR",
    errno.EPERM: "Make it yours with mode 0700, or set X07_VM_STATE_DIR and X07_VM_CACHE_DIR",
    errno.EIO: "Look at the system's log: the disk may be failing",
    errno.ENOMEM: "Close programs, or raise the limit on memory: ulimit -v",
    errno.EAGAIN: "Raise the limit on processes: ulimit -u",
}

_OUT_OF_TIME: Final = {-24, 128 + 24}  # SIGXCPU, as subprocess tells it, and as a shell does


def host_error(exc: OSError | MemoryError) -> HostError | None:
    """What to tell the user of *exc*; None if it is no such error, and so a bug."""
    if isinstance(exc, MemoryError):  # what Python makes of ENOMEM where it asks for memory itself
        exc = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    fix = _FIXES.get(exc.errno or 0)
    if fix is None:
        try:
            require_own_proc()
        except HostError as error:  # what cannot be found is most likely there
            return error
        return None
    place = os.fsdecode(exc.filename) if isinstance(exc.filename, str | bytes) else ""
    return HostError(f"cannot use {place}" if place else "cannot go on", exc.strerror or str(exc), fix)


def out_of_cpu_time(status: int | None) -> str:
    """What a machine did, if its exit status is that of SIGXCPU: the shell's limit on CPU time ended it. Else empty."""
    return "used all the CPU time that this shell allows a process (ulimit -H -t)" if status in _OUT_OF_TIME else ""


def fix_for(exc: OSError, otherwise: str) -> str:
    """What to do about *exc*: room, or a disk to write to, where that is what lacks, else *otherwise*."""
    return _FIXES[exc.errno] if exc.errno in {errno.ENOSPC, errno.EDQUOT, errno.EROFS} else otherwise


def require_own_proc() -> None:
    """Raise HostError where /proc is missing or tells of another pid namespace: no process could be found in it."""
    try:
        number = Path("/proc/self").readlink().name
    except OSError as exc:
        raise HostError("cannot look at processes", f"/proc: {exc.strerror}", "Mount /proc") from exc
    if number != str(os.getpid()):
        why = "/proc belongs to another pid namespace"
        raise HostError("cannot look at processes", why, "Mount one of this namespace: unshare --mount-proc")
