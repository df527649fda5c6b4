"""Operating system errors caused by the host's state rather than by a bug."""

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Final

from x07_sandbox.errors import Command, HostError, SandboxError, Text
from x07_sandbox.host.linux import require_own_proc

_WRONG_TYPE: Final = "Remove it; x07 creates its own"
_FIXES: Final[dict[int, Text]] = {
    errno.EISDIR: _WRONG_TYPE,
    errno.ENOTDIR: _WRONG_TYPE,
    errno.ELOOP: _WRONG_TYPE,
    errno.EMFILE: ("Raise the limit on open files: ", Command("ulimit -n")),
    errno.ENFILE: "Close programs; the system is out of file descriptors",
    errno.EFBIG: ("Raise the limit on file size: ", Command("ulimit -f")),
    errno.ENOSPC: "Free disk space, or set X07_VM_STATE_DIR and X07_VM_CACHE_DIR",
    errno.EDQUOT: "Free disk space, or set X07_VM_STATE_DIR and X07_VM_CACHE_DIR",
    errno.EROFS: "Set X07_VM_STATE_DIR and X07_VM_CACHE_DIR to folders that can be written",
    errno.EACCES: "Change its owner to yourself and its mode to 0700, or set X07_VM_STATE_DIR and X07_VM_CACHE_DIR",
    errno.EPERM: "Change its owner to yourself and its mode to 0700, or set X07_VM_STATE_DIR and X07_VM_CACHE_DIR",
    errno.EIO: "Check the system log; the disk may be failing",
    errno.ENOMEM: ("Close programs, or raise the limit on memory: ", Command("ulimit -v")),
    errno.ENOSYS: "Use Linux 5.6 or newer",
    errno.EAGAIN: ("Raise the limit on processes: ", Command("ulimit -u")),
}

_SIGXCPU: Final = {-24, 128 + 24}  # as status of subprocess, and of a shell


def host_error(exc: OSError | MemoryError) -> HostError | None:
    """Return the error to show to the user, or None if *exc* is a bug."""
    if isinstance(exc, MemoryError):  # Python's form of ENOMEM
        exc = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    fix = _FIXES.get(exc.errno or 0)
    if fix is None:
        try:
            require_own_proc()
        except HostError as error:  # the likely cause of a missing file
            return error
        return None
    place = os.fsdecode(exc.filename) if isinstance(exc.filename, str | bytes) else ""
    return HostError(f"cannot use {place}" if place else "cannot continue", exc.strerror or str(exc), fix)


def out_of_cpu_time(status: int | None) -> str:
    """Return a clause for messages if *status* shows that the shell's CPU time limit ended a process, else ""."""
    return "reached the CPU time limit of this shell (ulimit -H -t)" if status in _SIGXCPU else ""


@contextlib.contextmanager
def raised_as(kind: type[SandboxError], what: str, fix: Text) -> Iterator[None]:
    """Raise an OSError in the context as an error of this kind, with the system's words for why.

    fix: what to do, unless there are too many open files.
    """
    try:
        yield
    except OSError as exc:
        fix = _FIXES[exc.errno] if exc.errno in {errno.EMFILE, errno.ENFILE} else fix
        raise kind(what, exc.strerror or str(exc), fix) from exc


def fix_for(exc: OSError, otherwise: Text) -> Text:
    """Return the advice for a full or read-only file system or too many open files, or *otherwise* for other errors."""
    known = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE}
    return _FIXES[exc.errno] if exc.errno in known else otherwise
