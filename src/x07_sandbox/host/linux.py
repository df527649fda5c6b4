"""The system calls and files of /proc that only Linux has. The other modules of this package run on any POSIX system.

A function raises HostError if this system lacks what it needs. Support for another system is a module with the same
functions.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import struct
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from x07_sandbox.errors import Command, HostError
from x07_sandbox.host.waiting import write_all

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

_FIRST_PID_NAMESPACE: Final = "pid:[4026531836]"  # linux/proc_ns.h: PROC_PID_INIT_INO
CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid
_ROOT: Final = Path("/")
_GROUPS: Final = "sys/fs/cgroup"
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


def memory_file(data: bytes) -> int:
    """Return a file in memory with the content *data*, at offset 0. The caller owns the returned descriptor."""
    fd = new_memory_file()
    try:
        write_all(fd, data)
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd


def copy_range(source_fd: int, target_fd: int, size: int, at: int = 0) -> None:
    """Copy *size* bytes of a file from the offset *at* to where *target_fd* is. Raises OSError, also if it is shorter.

    File to file, sendfile(2) works only on Linux.
    """
    end = at + size
    while at < end:
        if not (count := os.sendfile(target_fd, source_fd, at, min(end - at, 1 << 30))):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        at += count


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


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """Return (pid, uid) of the peer, from the kernel (unix(7): SO_PEERCRED)."""
    import socket  # slow to import, and many commands connect to nothing

    data = connection.getsockopt(socket.SOL_SOCKET, _only_here(socket, "SO_PEERCRED"), CREDENTIALS.size)
    pid, uid, _ = CREDENTIALS.unpack(data)
    return pid, uid


def open_pidfd(pid: int) -> int:
    """Return an owned descriptor of a process, readable once the process has ended. Raises OSError."""
    fd: int = _only_here(os, "pidfd_open")(pid)
    return fd


def pid_of(pidfd: int) -> int:
    """Return the pid of the process of *pidfd* (pidfd_open(2)), or -1 if it has been reaped. Raises OSError."""
    info = (of_process(os.getpid(), f"fdinfo/{pidfd}") or b"").splitlines()
    return next((int(line.split()[1]) for line in info if line.startswith(b"Pid:")), -1)


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


# memory and cores: those of the host, or fewer if a cgroup or a CPU affinity limits this process


def memory_bytes(root: Path = _ROOT) -> int:
    """Return the available memory in bytes. root: the folder that contains proc and sys."""
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in _group_files(root, "memory", "memory.max", "memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such cgroup, or "max"
            found = min(found, int(path.read_text("ascii")))
    return found


def spare_bytes(root: Path = _ROOT) -> int:
    """Return how much memory new processes can get without swapping, or 0 if unknown. root: the folder of proc and sys.

    The limit of a container counts as if nothing of it were used, since most of what is used are cached files.
    """
    with contextlib.suppress(OSError):
        for line in (root / "proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return min(memory_bytes(root), int(line.split()[1]) << 10)
    return 0


def _group_files(root: Path, controller: str, name: str, old_name: str) -> Iterator[Path]:
    """Yield files that may contain a memory or CPU limit, from all cgroups of this process.

    name: the file's name in cgroup v2. old_name: the file's name in cgroup v1.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            folder, file = root / _GROUPS, name
        elif controller in controllers.split(","):
            folder, file = root / _GROUPS / controller, old_name
        else:
            continue
        yield folder / file
        for part in group.strip("/").split("/"):
            folder /= part
            yield folder / file


def cores(root: Path = _ROOT) -> int:
    """Return how many cores this process may use; part of a core counts as one. root: the folder of proc and sys."""
    found = len(_only_here(os, "sched_getaffinity")(0))
    for path in _group_files(root, "cpu", "cpu.max", "cpu.cfs_quota_us"):
        with contextlib.suppress(OSError, ValueError):  # no such cgroup, or "max"
            words = path.read_text("ascii").split()
            if len(words) == 1:  # cgroup v1 has two files
                words.append(path.with_name("cpu.cfs_period_us").read_text("ascii"))
            quota, period = map(int, words)
            if quota > 0 < period:  # -1: no limit
                found = min(found, -(-quota // period))
    return max(1, found)


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
