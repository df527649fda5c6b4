"""Confinement that the tool's network helpers apply to themselves.

gate      Opens TCP and UDP sockets and forwards data. It has one thread and can open no file.
resolver  Looks up host names with the C library, in threads. It can read the files needed for that.

The confinement is mostly a seccomp filter that lists the allowed system calls. Landlock restricts files. What remains
possible:

* Neither measure separates processes of one user. As root, a helper gets its own uid. An ordinary user's helper relies
  on the filter, which allows no call that reaches another process.
* The resolver may connect to every Unix stream socket that its uid may use, because name services use such sockets.
* A Unix datagram socket can be connected again. Therefore give a helper only stream or seqpacket sockets.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import signal
import socket
import stat
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from x07_sandbox.host.arch import host_arch
from x07_sandbox.host.settings import GIB, MIB
from x07_sandbox.jail.seccomp import (
    ALL_BITS,
    ARG0,
    ARG1,
    ARG2,
    COMMON_RULES,
    FSTAT_ONLY,
    REQUESTS,
    THREADS_ONLY,
    TMPFILE,
    Check,
    Rules,
    allowlist_filter,
)

if TYPE_CHECKING:
    from x07_sandbox.host.arch import Arch

Kind = Literal["gate", "resolver"]

BOTH: Final = (
    # data through open descriptors
    *("read", "write", "readv", "writev", "pread64", "pwrite64", "lseek", "close", "close_range", "dup", "dup3"),
    *("fstat", "ftruncate", "fsync", "fdatasync"),
    # waiting
    *("epoll_create1", "epoll_ctl", "epoll_pwait", "epoll_pwait2", "ppoll", "pselect6", "futex"),
    *("nanosleep", "clock_nanosleep", "clock_gettime", "clock_getres", "gettimeofday", "sched_yield"),
    # sockets
    *("connect", "bind", "shutdown", "sendto", "recvfrom", "sendmsg", "sendmmsg", "recvmsg"),
    *("getsockname", "getpeername", "getsockopt"),
    # this process's memory, signal handlers and end
    *("munmap", "mremap", "madvise", "brk", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack"),
    *("restart_syscall", "exit", "exit_group"),
    # facts about this process and the machine
    *("getpid", "getppid", "gettid", "getuid", "geteuid", "getgid", "getegid", "getresuid", "getresgid", "getgroups"),
    *("getrandom", "getrusage", "sched_getaffinity", "uname", "sysinfo"),
)
RESOLVER_ONLY: Final = (
    *("newfstatat", "statx", "faccessat", "faccessat2", "readlinkat", "getdents64", "getcwd"),
    *("set_robust_list", "rseq"),
)
# Older variants of these calls, missing on newer architectures.
BOTH_OLD: Final = ("epoll_wait", "poll", "select")
RESOLVER_OLD: Final = ("stat", "lstat", "access", "readlink")

_TYPE: Final = ~(socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) & ALL_BITS
# No other protocol, such as ICMP, MPTCP or SCTP: each is another part of the kernel.
_INTERNET_SOCKET: Final = (
    Check(ARG0, (socket.AF_INET, socket.AF_INET6)),
    Check(ARG1, (socket.SOCK_STREAM, socket.SOCK_DGRAM), _TYPE),
    Check(ARG2, (0, socket.IPPROTO_TCP, socket.IPPROTO_UDP)),
)
_UNIX_STREAM: Final = (Check(ARG0, (socket.AF_UNIX,)), Check(ARG1, (socket.SOCK_STREAM,), _TYPE), Check(ARG2, (0,)))
_ROUTES: Final = (  # how the C library learns this host's addresses
    Check(ARG0, (socket.AF_NETLINK,)),
    Check(ARG1, (socket.SOCK_RAW, socket.SOCK_DGRAM), _TYPE),
    Check(ARG2, (socket.NETLINK_ROUTE,)),
)
# No options that attach programs, join groups or replace the protocol's code.
_SOCKET_OPTIONS: Final = (
    *(socket.SO_REUSEADDR, socket.SO_KEEPALIVE, socket.SO_LINGER, socket.SO_BROADCAST),
    *(socket.SO_SNDBUF, socket.SO_RCVBUF, socket.SO_SNDTIMEO, socket.SO_RCVTIMEO),
)
_TCP_OPTIONS: Final = (
    *(socket.TCP_NODELAY, socket.TCP_CORK, socket.TCP_QUICKACK, socket.TCP_USER_TIMEOUT),
    *(socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT),
)
_IP_OPTIONS: Final = (10, 11)  # IP_MTU_DISCOVER, IP_RECVERR: Python has no names for them
_IPV6_OPTIONS: Final = (23, 25, socket.IPV6_V6ONLY)  # IPV6_MTU_DISCOVER, IPV6_RECVERR
_SIOCGIFINDEX: Final = 0x8933  # the number of a network interface, for a name server's address with a zone
_PROT_WRITE, _PROT_EXEC = 2, 4
_PR_SET_NAME, _PR_GET_NAME, _PR_GET_NO_NEW_PRIVS = 15, 16, 39
# O_WRONLY, O_RDWR, O_CREAT, O_TRUNC and O_TMPFILE's own bit have these values on all our architectures.
_WRITING: Final = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC | TMPFILE

_BOTH_RULES: Final[Rules] = {
    **COMMON_RULES,
    "ioctl": ((Check(ARG1, REQUESTS),),),
    "setsockopt": (
        (Check(ARG1, (socket.SOL_SOCKET,)), Check(ARG2, _SOCKET_OPTIONS)),
        (Check(ARG1, (socket.IPPROTO_TCP,)), Check(ARG2, _TCP_OPTIONS)),
        (Check(ARG1, (socket.IPPROTO_IP,)), Check(ARG2, _IP_OPTIONS)),
        (Check(ARG1, (socket.IPPROTO_IPV6,)), Check(ARG2, _IPV6_OPTIONS)),
    ),
    # For asyncio. Unlike datagram sockets, a stream pair cannot be connected again.
    "socketpair": (_UNIX_STREAM,),
    "mprotect": ((Check(ARG2, (0,), _PROT_EXEC),),),
    "prctl": ((Check(ARG0, (_PR_SET_NAME, _PR_GET_NAME, _PR_GET_NO_NEW_PRIVS)),),),
}
GATE_RULES: Final[Rules] = {
    **_BOTH_RULES,
    "socket": (_INTERNET_SOCKET,),
    "mmap": ((Check(ARG2, (0,), _PROT_EXEC),),),
    # For fstat in older C libraries. A filter cannot see the path, so it still reveals which files exist.
    "newfstatat": FSTAT_ONLY,
}
RESOLVER_RULES: Final[Rules] = {
    **_BOTH_RULES,
    "ioctl": ((Check(ARG1, (*REQUESTS, _SIOCGIFINDEX)),),),
    # No AF_UNIX: the user's own sockets, such as the session bus, would be a way out. The C library falls back from
    # nscd, sssd and systemd-resolved's socket to /etc/resolv.conf.
    "socket": (_INTERNET_SOCKET, _ROUTES),
    # Libraries have to be mapped executable; nothing is both writable and executable.
    "mmap": ((Check(ARG2, (0, _PROT_WRITE, _PROT_EXEC), _PROT_WRITE | _PROT_EXEC),),),
    "open": ((Check(ARG1, (0,), _WRITING),),),
    "openat": ((Check(ARG2, (0,), _WRITING),),),
    "clone": THREADS_ONLY,
}


def gate_filter(arch: Arch) -> bytes:
    """Return the gate's seccomp filter, an array of struct sock_filter."""
    return allowlist_filter(arch, (*BOTH, *BOTH_OLD), GATE_RULES, {})


def resolver_filter(arch: Arch) -> bytes:
    """Return the resolver's seccomp filter, an array of struct sock_filter."""
    names = (*BOTH, *RESOLVER_ONLY, *BOTH_OLD, *RESOLVER_OLD)
    # The flags of clone3 are in memory, unseen by filters; the C library falls back on clone.
    return allowlist_filter(arch, names, RESOLVER_RULES, {"clone3": errno.ENOSYS})


LANDLOCK_LATEST: Final = 6  # the latest version that we know; later kernels keep its rights
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_SCOPES: Final = 1 << 0 | 1 << 1  # abstract Unix sockets, and signals to processes outside
_SCOPES_SINCE: Final = 6
# Rights on files by the version that extended them: REFER, TRUNCATE and IOCTL_DEV.
_FILE_RIGHTS: Final = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
_LANDLOCK_CREATE_RULESET: Final = 444  # these numbers are the same everywhere
_LANDLOCK_ADD_RULE: Final = 445
_LANDLOCK_RESTRICT_SELF: Final = 446
_CREATE_RULESET_VERSION: Final = 1
_RULE_PATH_BENEATH: Final = 1

# What the C library reads to resolve a name.
_SETTINGS: Final = (
    *("resolv.conf", "hosts", "nsswitch.conf", "gai.conf", "host.conf"),
    *("services", "protocols", "ld.so.cache"),
)
_FOLDERS: Final = (
    *("/run/systemd/resolve", "/run/nscd", "/run/resolvconf"),
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/dev/urandom"),
)


def _readable() -> Iterator[str]:
    """Yield the files and folders that the resolver may read, whether or not they exist.

    Landlock rules apply to inodes, so a replaced settings file becomes unreadable. If the file is a link to a place
    below /run, the whole target folder is allowed, because its manager may replace files at any time.
    """
    for name in _SETTINGS:
        path = Path("/etc", name)
        yield str(path)
        folder = path.resolve().parent
        if Path("/run") in folder.parents:
            yield str(folder)
    yield from _FOLDERS
    prefixes = {sys.base_prefix, sys.base_exec_prefix, sys.prefix, sys.exec_prefix}
    yield from sorted({f"{prefix}/{folder}" for prefix in prefixes for folder in ("lib", sys.platlibdir)})
    yield str(Path(os.__file__).parent)


def _allow_reading(ruleset: int, path: str) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # missing, or not accessible for this user
        return
    try:
        rights = _READ_FILE | _READ_DIR if stat.S_ISDIR(os.fstat(fd).st_mode) else _READ_FILE
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, fd))
        _call(_LANDLOCK_ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.addressof(rule), 0)
    finally:
        os.close(fd)


def _landlock(kind: Kind) -> int:
    """Restrict this thread to the files that *kind* needs. Return Landlock's version, or 0 if Landlock is missing."""
    try:
        found = _call(_LANDLOCK_CREATE_RULESET, 0, 0, _CREATE_RULESET_VERSION)
    except OSError:
        return 0
    version = min(found, LANDLOCK_LATEST)
    rights = _FILE_RIGHTS[min(version, max(_FILE_RIGHTS))]
    # TCP is not restricted here: the gate itself decides about connections.
    attributes = struct.pack("=QQQ", rights, 0, _SCOPES if version >= _SCOPES_SINCE else 0)
    room = ctypes.create_string_buffer(attributes, len(attributes))
    ruleset = _call(_LANDLOCK_CREATE_RULESET, ctypes.addressof(room), len(attributes), 0)
    try:
        for path in _readable() if kind == "resolver" else ():
            _allow_reading(ruleset, path)
        _call(_LANDLOCK_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return version


_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_CAPBSET_READ: Final = 23
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_CAPABILITY_VERSION: Final = 0x20080522  # of capset's structures (capabilities(7)), two times three words
_CAPABILITIES_MOST: Final = 64
_SECCOMP_SET_MODE_FILTER: Final = 1
_SECCOMP_FILTER_FLAG_TSYNC: Final = 1
_FDS: Final = 1024
_FILE_BYTES: Final = 16 * MIB
_ADDRESS_SPACE: Final[dict[Kind, int]] = {"gate": 512 * MIB, "resolver": GIB}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype, _libc.syscall.argtypes = ctypes.c_long, [ctypes.c_long] * 6
_libc.prctl.restype, _libc.prctl.argtypes = ctypes.c_int, [ctypes.c_int, *[ctypes.c_ulong] * 4]


def confine(kind: Kind, *, uid: int | None) -> tuple[str, ...]:
    """Drop all rights of this process that *kind* does not need, and return the names of the measures.

    Call this after all imports and before any thread starts. uid: as root, a uid and gid for this process alone. When
    the thread that started the process ends, the kernel kills the process, unless that thread may not signal it: the
    thread lacks CAP_KILL for another uid, or is in a Landlock domain. Raises OSError if a measure fails, or HostError
    on an unsupported architecture. The process must then exit, since it is only partly confined.
    """
    _require_one_thread()
    program = (gate_filter if kind == "gate" else resolver_filter)(host_arch())
    if kind == "resolver":
        import encodings.idna  # noqa: F401 - getaddrinfo would import it later, when its file is out of reach
    if uid is not None:
        os.setgroups([])
    _drop_bounding_set(required=uid is not None)
    if uid is not None:
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    _drop_capabilities()
    _prctl(_PR_SET_DUMPABLE, 0)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # after the change of uid, which resets it
    _limit(kind)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    version = _landlock(kind)
    _install(program)
    walls = ["own uid"] if uid is not None else []
    walls += ["no capabilities", "no new privileges"]
    walls += [f"Landlock {version}"] if version else []
    return (*walls, "seccomp")


def _require_one_thread() -> None:
    """Raise OSError if there are several threads: Landlock restricts only the calling thread."""
    with contextlib.suppress(FileNotFoundError):  # no /proc
        if len(list(Path("/proc/self/task").iterdir())) > 1:
            raise OSError(errno.EBUSY, "a helper confines itself before it starts threads")


def _drop_bounding_set(*, required: bool) -> None:
    for capability in range(_CAPABILITIES_MOST):
        try:
            held = _prctl(_PR_CAPBSET_READ, capability)
        except OSError:  # the kernel has no more capabilities
            return
        if not held:
            continue
        try:
            _prctl(_PR_CAPBSET_DROP, capability)
        except PermissionError:  # of an ordinary user; without new privileges it is harmless
            if required:
                raise
            return


def _drop_capabilities() -> None:
    with contextlib.suppress(OSError):  # older kernels have no ambient set; capset clears it as well
        _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION, 0))
    none = ctypes.create_string_buffer(24)
    _call(host_arch().syscalls["capset"], ctypes.addressof(header), ctypes.addressof(none))


def _limit(kind: Kind) -> None:
    limits = {
        resource.RLIMIT_NOFILE: _FDS,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_AS: _ADDRESS_SPACE[kind],
        resource.RLIMIT_FSIZE: _FILE_BYTES,
        resource.RLIMIT_MEMLOCK: 0,
    }
    if kind == "gate":
        limits[resource.RLIMIT_NPROC] = 0  # only this process is affected, whatever else the user runs
    for what, most in limits.items():
        hard = resource.getrlimit(what)[1]
        value = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (value, value))


def _install(program: bytes) -> None:
    """Apply a filter to all threads of this process."""
    code = ctypes.create_string_buffer(program, len(program))
    described = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(code)))
    number = host_arch().syscalls["seccomp"]
    if _call(number, _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC, ctypes.addressof(described)):
        raise OSError(errno.ESRCH, "a thread has another seccomp filter")


def _call(number: int, *words: int) -> int:
    """Make a system call that has no function in the C library. Raises OSError if the call fails."""
    return _checked(int(_libc.syscall(number, *[*words, 0, 0, 0, 0, 0][:5])), f"system call {number}")


def _prctl(option: int, *values: int) -> int:
    return _checked(int(_libc.prctl(option, *[*values, 0, 0, 0, 0][:4])), f"prctl {option}")


def _checked(result: int, name: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), name)
    return result
