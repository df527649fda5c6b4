"""Confinement of the tool's own helper processes, which talk to the network for a job: each gives up its own rights.

gate      opens TCP and UDP sockets and passes data on. It has one thread, and may open no file.
resolver  looks up host names with the C library, in threads. It may read the files that this takes.

Two walls do most of it: a seccomp filter that lists the allowed system calls and answers EPERM to all others, and
Landlock, which decides about files by where they are. Three things stay open, and the caller has to know them:

* Neither wall parts processes of one user from each other. As root the helper gets a uid of its own; an ordinary
  user's helper relies on the filter alone, which has no call that reaches another process.
* The resolver may connect to every Unix stream socket that its uid may, since name services are behind such sockets.
* A Unix datagram socket that the helper is given can be connected anew. Give it stream or seqpacket sockets only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import resource
import signal
import socket
import stat
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from x07_sandbox.host.arch import host_arch
from x07_sandbox.host.settings import GIB, MIB
from x07_sandbox.jail.seccomp import (
    ALL_BITS,
    CLONE_NEW,
    CLONE_THREAD,
    ERRNO,
    JEQ,
    RETURN,
    Check,
    Rules,
    allowing,
    line,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from x07_sandbox.host.arch import Arch

Kind = Literal["gate", "resolver"]

# --- the calls -------------------------------------------------------------------------------------------------------

BOTH: Final = (
    # data through descriptors that are open
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
# Older forms of calls above, which newer architectures do not have.
BOTH_OLD: Final = ("epoll_wait", "poll", "select")
RESOLVER_OLD: Final = ("stat", "lstat", "access", "readlink")

_ARG0, _ARG1, _ARG2 = 0, 2, 4
_ARG3, _ARG4 = 6, 8
_TYPE: Final = ~(socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) & ALL_BITS
_INTERNET: Final = (socket.AF_INET, socket.AF_INET6)
# No other protocol, such as ICMP, MPTCP or SCTP: each is a further part of the kernel.
_INTERNET_SOCKET: Final = (
    Check(_ARG0, _INTERNET),
    Check(_ARG1, (socket.SOCK_STREAM, socket.SOCK_DGRAM), _TYPE),
    Check(_ARG2, (0, socket.IPPROTO_TCP, socket.IPPROTO_UDP)),
)
_UNIX_STREAM: Final = (Check(_ARG0, (socket.AF_UNIX,)), Check(_ARG1, (socket.SOCK_STREAM,), _TYPE), Check(_ARG2, (0,)))
_ROUTES: Final = (  # how the C library finds out which addresses this host has
    Check(_ARG0, (socket.AF_NETLINK,)),
    Check(_ARG1, (socket.SOCK_RAW, socket.SOCK_DGRAM), _TYPE),
    Check(_ARG2, (socket.NETLINK_ROUTE,)),
)
# Options of sockets, without those that attach programs, join groups or replace the protocol's code.
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
# FIONREAD, FIONBIO, FIONCLEX, FIOCLEX: the last two are how Python sets FD_CLOEXEC.
_REQUESTS: Final = (0x541B, 0x5421, 0x5450, 0x5451)
_SIOCGIFINDEX: Final = 0x8933  # the number of a network interface: a name server's address may end in its name
_AT_EMPTY_PATH: Final = 0x1000
_PROT_WRITE, _PROT_EXEC = 2, 4
_PR_SET_NAME, _PR_GET_NAME, _PR_GET_NO_NEW_PRIVS = 15, 16, 39
_FCNTL: Final = (fcntl.F_DUPFD, fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL, fcntl.F_SETFL, fcntl.F_DUPFD_CLOEXEC)
# O_WRONLY, O_RDWR, O_CREAT, O_TRUNC and the bit of O_TMPFILE that is its own: the same on all our architectures.
_WRITING: Final = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC | 0x400000

_BOTH_RULES: Final[Rules] = {
    "fcntl": ((Check(_ARG1, _FCNTL),),),
    "ioctl": ((Check(_ARG1, _REQUESTS),),),
    "setsockopt": (
        (Check(_ARG1, (socket.SOL_SOCKET,)), Check(_ARG2, _SOCKET_OPTIONS)),
        (Check(_ARG1, (socket.IPPROTO_TCP,)), Check(_ARG2, _TCP_OPTIONS)),
        (Check(_ARG1, (socket.IPPROTO_IP,)), Check(_ARG2, _IP_OPTIONS)),
        (Check(_ARG1, (socket.IPPROTO_IPV6,)), Check(_ARG2, _IPV6_OPTIONS)),
    ),
    # A pair is connected for good, unlike one of datagrams. An asyncio loop makes one for itself.
    "socketpair": (_UNIX_STREAM,),
    "mprotect": ((Check(_ARG2, (0,), _PROT_EXEC),),),
    "prctl": ((Check(_ARG0, (_PR_SET_NAME, _PR_GET_NAME, _PR_GET_NO_NEW_PRIVS)),),),
    # Reading this process's own limits: pid 0, and no address of new ones.
    "prlimit64": ((Check(_ARG0, (0,)), Check(_ARG2, (0,)), Check(_ARG2 + 1, (0,))),),
}
GATE_RULES: Final[Rules] = {
    **_BOTH_RULES,
    "socket": (_INTERNET_SOCKET,),
    "mmap": ((Check(_ARG2, (0,), _PROT_EXEC),),),
    # How older C libraries look at an open file. A path is in memory, out of a filter's sight: so this can still tell
    # which files exist, their sizes and times.
    "newfstatat": ((Check(_ARG3, (_AT_EMPTY_PATH,)),),),
}
RESOLVER_RULES: Final[Rules] = {
    **_BOTH_RULES,
    "ioctl": ((Check(_ARG1, (*_REQUESTS, _SIOCGIFINDEX)),),),
    # No AF_UNIX: a user's own sockets, such as the session bus, would be a way out. The C library goes on without
    # nscd, sssd and systemd-resolved's own socket: what /etc/resolv.conf names answers.
    "socket": (_INTERNET_SOCKET, _ROUTES),
    # Libraries are mapped to be executed; nothing is both written and executed.
    "mmap": ((Check(_ARG2, (0, _PROT_WRITE, _PROT_EXEC), _PROT_WRITE | _PROT_EXEC),),),
    "open": ((Check(_ARG1, (0,), _WRITING),),),
    "openat": ((Check(_ARG2, (0,), _WRITING),),),
    "clone": ((Check(_ARG0, (CLONE_THREAD,), CLONE_THREAD | CLONE_NEW),),),
}


def gate_filter(arch: Arch) -> bytes:
    """The gate's seccomp filter, an array of struct sock_filter."""
    return allowing(arch, (*BOTH, *BOTH_OLD), GATE_RULES)


def resolver_filter(arch: Arch) -> bytes:
    """The resolver's seccomp filter, an array of struct sock_filter."""
    # The flags of clone3 are in memory, where no filter can see them; the C library falls back on clone.
    missing = [line(JEQ, arch.syscalls["clone3"], 0, 1), line(RETURN, ERRNO | errno.ENOSYS)]
    names = (*BOTH, *RESOLVER_ONLY, *BOTH_OLD, *RESOLVER_OLD)
    return allowing(arch, names, RESOLVER_RULES, missing)


# --- files -----------------------------------------------------------------------------------------------------------

LANDLOCK_LATEST: Final = 6  # the version whose rights are known here; later kernels keep them
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_SCOPES: Final = 1 << 0 | 1 << 1  # connecting to abstract Unix sockets of others, and signals to them
_SCOPES_SINCE: Final = 6
# Rights about files by the version that brought the last of them: REFER, TRUNCATE and IOCTL_DEV came later.
_FILE_RIGHTS: Final = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
_LANDLOCK_CREATE_RULESET: Final = 444  # these have one number everywhere
_LANDLOCK_ADD_RULE: Final = 445
_LANDLOCK_RESTRICT_SELF: Final = 446
_CREATE_RULESET_VERSION: Final = 1
_RULE_PATH_BENEATH: Final = 1

# What the C library reads to look up a name.
_SETTINGS: Final = (
    *("resolv.conf", "hosts", "nsswitch.conf", "gai.conf", "host.conf"),
    *("services", "protocols", "ld.so.cache"),
)
_FOLDERS: Final = (
    *("/run/systemd/resolve", "/run/nscd", "/run/resolvconf"),
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/dev/urandom"),
)
_RUN: Final = Path("/run")


def _readable() -> Iterator[str]:
    """Files and folders that the resolver may read, whether they exist or not.

    A settings file that is replaced by a new one is out of reach from then on, unless it is a link into a folder below
    /run: whoever manages such a folder replaces its files at any time, so all of it may be read.
    """
    for name in _SETTINGS:
        path = Path("/etc", name)
        yield str(path)
        folder = path.resolve().parent
        if _RUN in folder.parents:
            yield str(folder)
    yield from _FOLDERS
    prefixes = {sys.base_prefix, sys.base_exec_prefix, sys.prefix, sys.exec_prefix}
    yield from sorted({f"{prefix}/{folder}" for prefix in prefixes for folder in ("lib", sys.platlibdir)})
    yield str(Path(os.__file__).parent)


def _allow_reading(ruleset: int, path: str) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # missing, or out of this user's reach anyway
        return
    try:
        rights = _READ_FILE | _READ_DIR if stat.S_ISDIR(os.fstat(fd).st_mode) else _READ_FILE
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, fd))
        _call(_LANDLOCK_ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.addressof(rule), 0)
    finally:
        os.close(fd)


def _landlock(kind: Kind) -> int:
    """Forbid this thread all files that *kind* does not need; the version that does it, or 0 for no Landlock."""
    try:
        found = _call(_LANDLOCK_CREATE_RULESET, 0, 0, _CREATE_RULESET_VERSION)
    except OSError:
        return 0
    version = min(found, LANDLOCK_LATEST)
    rights = _FILE_RIGHTS[min(version, max(_FILE_RIGHTS))]
    # No right about TCP is handled: where the gate connects to is its own decision.
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


# --- the process -----------------------------------------------------------------------------------------------------

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_CAPBSET_READ: Final = 23
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_CAPABILITY_VERSION: Final = 0x20080522  # of capset's structures (capabilities(7)): two times three words
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
    """Take all rights away from this process that *kind* does not need; the names of the walls that stand.

    uid: as root, a uid (and gid) that no other process has; None stays this user. Call it before any thread is started
    and after all modules are imported. The process is killed at the end of the thread that started it, if that may
    signal it: it must not have given up CAP_KILL where the uid differs, nor be in a Landlock domain of its own.

    Raises OSError, or HostError on an architecture that has no filter; the process must end then, half confined.
    """
    _require_one_thread()
    program = (gate_filter if kind == "gate" else resolver_filter)(host_arch())
    if kind == "resolver":
        import encodings.idna  # noqa: F401 - Python's getaddrinfo does this at its first name; the files may be hidden
    if uid is not None:
        os.setgroups([])
    _drop_bounding_set(required=uid is not None)
    if uid is not None:
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    _drop_capabilities()
    _prctl(_PR_SET_DUMPABLE, 0)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # the kernel forgets it when the uid changes
    _limit(kind)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    version = _landlock(kind)
    _install(program)
    walls = ["own uid"] if uid is not None else []
    walls += ["no capabilities", "no new privileges"]
    walls += [f"Landlock {version}"] if version else []
    return (*walls, "seccomp")


def _require_one_thread() -> None:
    """Landlock binds only the thread that calls."""
    with contextlib.suppress(FileNotFoundError):  # no /proc
        if len(list(Path("/proc/self/task").iterdir())) > 1:
            raise OSError(errno.EBUSY, "a helper confines itself before it starts threads")


def _drop_bounding_set(*, required: bool) -> None:
    for capability in range(_CAPABILITIES_MOST):
        try:
            held = _prctl(_PR_CAPBSET_READ, capability)
        except OSError:  # the kernel has no more
            return
        if not held:
            continue
        try:
            _prctl(_PR_CAPBSET_DROP, capability)
        except PermissionError:  # an ordinary user's; without new privileges nothing comes of it
            if required:
                raise
            return


def _drop_capabilities() -> None:
    with contextlib.suppress(OSError):  # older kernels have no ambient set; capset empties it too, with the others
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
        limits[resource.RLIMIT_NPROC] = 0  # of this process alone: whatever the user runs, it starts nothing
    for what, most in limits.items():
        hard = resource.getrlimit(what)[1]
        value = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (value, value))


def _install(program: bytes) -> None:
    """Put all threads of this process under a filter."""
    code = ctypes.create_string_buffer(program, len(program))
    described = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(code)))
    number = host_arch().syscalls["seccomp"]
    if _call(number, _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC, ctypes.addressof(described)):
        raise OSError(errno.ESRCH, "a thread has another seccomp filter")  # the result is its number


def _call(number: int, *words: int) -> int:
    """Make a system call that the C library has no function for. Raises OSError."""
    padded = [*words, 0, 0, 0, 0, 0][:5]
    result = int(_libc.syscall(number, *padded))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), f"system call {number}")
    return result


def _prctl(option: int, *values: int) -> int:
    padded = [*values, 0, 0, 0, 0][:4]
    result = int(_libc.prctl(option, *padded))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), f"prctl {option}")
    return result
