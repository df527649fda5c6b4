"""The system calls and files of /proc that only Linux has. The other modules of this package run on any POSIX system.

A function raises HostError if this system lacks what it needs. Support for another system is a module with the same
functions.
"""

import contextlib
import os
import re
import signal
import socket
import struct
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from x07_sandbox.errors import Command, HostError

_FIRST_PID_NAMESPACE: Final = "pid:[4026531836]"  # linux/proc_ns.h: PROC_PID_INIT_INO
_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid
_OCTAL: Final = re.compile(rb"\\([0-7]{3})")  # escapes of blanks and others in mountinfo
_OPENAT2: Final = 437  # the same on every architecture
_OPEN_HOW: Final = struct.Struct("3Q")  # struct open_how: flags, mode, resolve


def _only_here(place: object, name: str) -> Any:  # noqa: ANN401 - functions and constants
    """Return a function or constant that only Linux has. Raises HostError if it is missing."""
    found = getattr(place, name, None)
    if found is None:
        raise HostError("cannot run programs on this system", f"it lacks {name}, which Linux has", "Run x07 on Linux")
    return found


def require_linux() -> None:
    """Raise HostError on a system without pidfds, with which x07 watches and ends every job."""
    _only_here(os, "pidfd_open")


def new_memory_file() -> int:
    """Return an owned descriptor of an empty file in memory (memfd_create(2))."""
    fd: int = _only_here(os, "memfd_create")("x07", os.MFD_CLOEXEC)
    return fd


def new_unnamed_file(folder: Path) -> int:
    """Return an owned descriptor of an empty file without a name on the disk of *folder*. Raises OSError, HostError."""
    return os.open(folder, _only_here(os, "O_TMPFILE") | os.O_RDWR | os.O_CLOEXEC, 0o600)


def path_flag() -> int:
    """Return the flag for a descriptor that only names a file or folder (open(2): O_PATH)."""
    flag: int = _only_here(os, "O_PATH")
    return flag


def boot_ms() -> int:
    """Return milliseconds since boot, including suspend."""
    return time.clock_gettime_ns(_only_here(time, "CLOCK_BOOTTIME")) // 1_000_000


def allowed_cores() -> int:
    """Return the number of cores that the CPU affinity of this process allows."""
    return len(_only_here(os, "sched_getaffinity")(0))


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """Return (pid, uid) of the peer, from the kernel (unix(7): SO_PEERCRED)."""
    data = connection.getsockopt(socket.SOL_SOCKET, _only_here(socket, "SO_PEERCRED"), _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(data)
    return pid, uid


def open_pidfd(pid: int) -> int:
    """Return an owned descriptor of a process, readable once the process has ended. Raises OSError."""
    fd: int = _only_here(os, "pidfd_open")(pid)
    return fd


def send_signal(pidfd: int, number: int) -> None:
    """Send a signal to the process of *pidfd*, unless that process has been reaped."""
    with contextlib.suppress(ProcessLookupError):
        _only_here(signal, "pidfd_send_signal")(pidfd, number)


def fd_path(fd: int) -> str:
    """Return a path that reaches the file of *fd*, even after its names change."""
    return f"/proc/self/fd/{fd}"


# processes and processors


@cache
def boot_id() -> str:
    """Return the id of this boot (random(4): boot_id). Raises HostError if /proc does not show it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError as exc:
        require_own_proc()
        why = f"{exc.strerror} ({exc.filename})"
        fix = "Mount /proc without subset=pid (in a systemd unit: ProcSubset=all)"
        raise HostError("cannot identify this boot", why, fix) from exc


def pid_namespace() -> str:
    """Return this process's pid namespace."""
    return str(Path("/proc/self/ns/pid").readlink())


def sees_every_process() -> bool:
    """Return whether this is the initial pid namespace, in which every process is visible."""
    return pid_namespace() == _FIRST_PID_NAMESPACE


def require_own_proc() -> None:
    """Raise HostError if /proc is missing or belongs to another pid namespace."""
    try:
        number = Path("/proc/self").readlink().name
    except OSError as exc:
        raise HostError("cannot inspect processes", f"/proc cannot be read ({exc.strerror})", "Mount /proc") from exc
    if number != str(os.getpid()):
        why = "/proc belongs to another pid namespace"
        fix = ("Mount this namespace's own /proc: ", Command("unshare --mount-proc"))
        raise HostError("cannot inspect processes", why, fix)


def of_process(pid: int, name: str) -> bytes | None:
    """Return the content of the file *name* of a process in /proc, or None if there is no such process.

    Raises HostError, OSError.
    """
    try:
        with open(f"/proc/{pid}/{name}", "rb", buffering=0) as file:  # noqa: PTH123 - called very often
            return file.read()
    except (FileNotFoundError, ProcessLookupError) as exc:
        if not os.path.lexists("/proc/self"):
            raise HostError("cannot inspect processes", "/proc cannot be read", "Mount /proc") from exc
        return None


def process_ids() -> list[int]:
    """Return the pids of all visible processes."""
    return [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit()]


def children_of(pid: int) -> list[int]:
    """Return the children of a single-threaded process (proc(5): /proc/PID/task/TID/children)."""
    return [int(word) for word in (of_process(pid, f"task/{pid}/children") or b"").split()]


def processor(*names: str) -> list[str]:
    """Return the distinct lines of /proc/cpuinfo that have one of *names*, sorted. Raises HostError without /proc."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as exc:
        raise HostError("cannot inspect the processor", f"{exc.strerror} (/proc/cpuinfo)", "Mount /proc") from exc
    return sorted({line for line in lines if line.partition("\t")[0] in names})


# files


class Mounted(NamedTuple):
    """One mount. number: its id. place: mount point. kind: file system type."""

    number: int
    place: bytes
    kind: str


def mounts() -> Iterator[Mounted]:
    """Yield all mounts of this process. Mounts on one mount point come lowest first. Raises OSError without /proc."""
    with Path("/proc/self/mountinfo").open("rb") as file:
        for line in file:
            before, _, after = line.partition(b" - ")
            words = before.split(b" ")
            place = _OCTAL.sub(lambda found: bytes([int(found[1], 8)]), words[4])
            yield Mounted(int(words[0]), place, after.partition(b" ")[0].decode(errors="replace"))


def openat2(dir_fd: int, name: str, flags: int, resolve: int) -> int:
    """Open a name below a folder and return the descriptor. resolve: rules about links and mounts. Raises OSError."""
    how = _OPEN_HOW.pack(flags, 0, resolve)
    fd, code = _call_libc("syscall", _OPENAT2, dir_fd, os.fsencode(name), how, len(how))
    if fd < 0:
        raise OSError(code, os.strerror(code), name)
    return fd


def renameat2(fd: int, name: str, to_fd: int, to: str, flags: int) -> int:
    """Rename by the rules in *flags*. Return 0, or the number of the error."""
    failed, code = _call_libc("renameat2", fd, os.fsencode(name), to_fd, os.fsencode(to), flags)
    return code if failed else 0


def sync(fd: int) -> None:
    """Flush the file system of *fd* to disk: syncfs(2). Raises OSError if that fails."""
    failed, code = _call_libc("syncfs", fd)
    if failed:
        raise OSError(code, os.strerror(code))


def _call_libc(name: str, *words: int | bytes) -> tuple[int, int]:
    """Call a function of the C library. Return its result and the number of the error."""
    import ctypes  # slow to import, and needed only for runs with host files

    values = [ctypes.c_long(word) if isinstance(word, int) else ctypes.c_char_p(word) for word in words]
    result = int(_only_here(ctypes.CDLL(None, use_errno=True), name)(*values))
    return result, ctypes.get_errno()
