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

import contextlib
import errno
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from x07_sandbox import kernel
from x07_sandbox.host.arch import Arch, host_arch
from x07_sandbox.host.settings import GIB, MIB
from x07_sandbox.jail import seccomp
from x07_sandbox.jail.seccomp import Check, Rules

Kind = Literal["gate", "resolver"]

# Older variants of some calls, such as poll, are missing on newer architectures.
BOTH: Final = (
    # data through open descriptors
    *("read", "write", "readv", "writev", "pread64", "pwrite64", "lseek", "close", "close_range", "dup", "dup3"),
    *("fstat", "ftruncate", "fsync", "fdatasync"),
    # waiting
    *("epoll_create1", "epoll_ctl", "epoll_pwait", "epoll_pwait2", "ppoll", "pselect6", "futex"),
    *("epoll_wait", "poll", "select"),
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
    *("stat", "lstat", "access", "readlink", "set_robust_list", "rseq"),
)

_TYPE: Final = ~(socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) & seccomp.ALL_BITS
# No other protocol, such as ICMP, MPTCP or SCTP: each is another part of the kernel.
_INTERNET_SOCKET: Final = (
    Check(0, (socket.AF_INET, socket.AF_INET6)),
    Check(1, (socket.SOCK_STREAM, socket.SOCK_DGRAM), _TYPE),
    Check(2, (0, socket.IPPROTO_TCP, socket.IPPROTO_UDP)),
)
_UNIX_STREAM: Final = (Check(0, (socket.AF_UNIX,)), Check(1, (socket.SOCK_STREAM,), _TYPE), Check(2, (0,)))
_ROUTES: Final = (  # how the C library learns this host's addresses
    Check(0, (socket.AF_NETLINK,)),
    Check(1, (socket.SOCK_RAW, socket.SOCK_DGRAM), _TYPE),
    Check(2, (socket.NETLINK_ROUTE,)),
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
_WRITING: Final = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC | seccomp.TMPFILE

_BOTH_RULES: Final[Rules] = {
    **seccomp.COMMON_RULES,
    "ioctl": ((Check(1, seccomp.REQUESTS),),),
    "setsockopt": (
        (Check(1, (socket.SOL_SOCKET,)), Check(2, _SOCKET_OPTIONS)),
        (Check(1, (socket.IPPROTO_TCP,)), Check(2, _TCP_OPTIONS)),
        (Check(1, (socket.IPPROTO_IP,)), Check(2, _IP_OPTIONS)),
        (Check(1, (socket.IPPROTO_IPV6,)), Check(2, _IPV6_OPTIONS)),
    ),
    # For asyncio. Unlike datagram sockets, a stream pair cannot be connected again.
    "socketpair": (_UNIX_STREAM,),
    "mprotect": ((Check(2, (0,), _PROT_EXEC),),),
    "prctl": ((Check(0, (_PR_SET_NAME, _PR_GET_NAME, _PR_GET_NO_NEW_PRIVS)),),),
}
GATE_RULES: Final[Rules] = {
    **_BOTH_RULES,
    "socket": (_INTERNET_SOCKET,),
    "mmap": ((Check(2, (0,), _PROT_EXEC),),),
    # For fstat in older C libraries. A filter cannot see the path, so it still reveals which files exist.
    "newfstatat": seccomp.FSTAT_ONLY,
}
RESOLVER_RULES: Final[Rules] = {
    **_BOTH_RULES,
    "ioctl": ((Check(1, (*seccomp.REQUESTS, _SIOCGIFINDEX)),),),
    # No AF_UNIX: the user's own sockets, such as the session bus, would be a way out. The C library falls back from
    # nscd, sssd and systemd-resolved's socket to /etc/resolv.conf.
    "socket": (_INTERNET_SOCKET, _ROUTES),
    # Libraries have to be mapped executable; nothing is both writable and executable.
    "mmap": ((Check(2, (0, _PROT_WRITE, _PROT_EXEC), _PROT_WRITE | _PROT_EXEC),),),
    "open": ((Check(1, (0,), _WRITING),),),
    "openat": ((Check(2, (0,), _WRITING),),),
    "clone": seccomp.THREADS_ONLY,
}


def gate_filter(arch: Arch) -> bytes:
    """Return the gate's seccomp filter, an array of struct sock_filter."""
    return seccomp.allowlist_filter(arch, BOTH, GATE_RULES, {})


def resolver_filter(arch: Arch) -> bytes:
    """Return the resolver's seccomp filter, an array of struct sock_filter."""
    # The flags of clone3 are in memory, unseen by filters; the C library falls back on clone.
    return seccomp.allowlist_filter(arch, (*BOTH, *RESOLVER_ONLY), RESOLVER_RULES, {"clone3": errno.ENOSYS})


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


def _landlock(kind: Kind) -> int:
    """Restrict this thread to the files that *kind* needs. Return Landlock's version, or 0 if Landlock is missing."""
    if not (version := min(kernel.landlock_version(), kernel.LANDLOCK_LATEST)):
        return 0
    files, _, scopes = kernel.landlock_restrictions(version)  # not TCP: the gate itself decides about connections
    ruleset = kernel.landlock_ruleset(files, scopes=scopes)
    try:
        for path in _readable() if kind == "resolver" else ():
            with contextlib.suppress(OSError):  # missing, or not accessible for this user
                rights = kernel.READ_FILE | (kernel.READ_DIR if Path(path).is_dir() else 0)
                kernel.landlock_allow(ruleset, path, rights)
        kernel.landlock_restrict(ruleset)
    finally:
        os.close(ruleset)
    return version


_FDS: Final = 1024
_FILE_BYTES: Final = 16 * MIB
_ADDRESS_SPACE: Final[dict[Kind, int]] = {"gate": 512 * MIB, "resolver": GIB}


def confine(kind: Kind, *, uid: int | None) -> tuple[str, ...]:
    """Drop all rights of this process that *kind* does not need, and return the names of the measures.

    Call this after all imports and before any thread starts. uid: as root, a uid and gid for this process alone. When
    the thread that started the process ends, the kernel kills the process, unless that thread may not signal it: the
    thread lacks CAP_KILL for another uid, or is in a Landlock domain. Raises OSError if a measure fails, or HostError
    on an unsupported architecture. The process must then exit, since it is only partly confined.
    """
    with contextlib.suppress(FileNotFoundError):  # no /proc
        if len(list(Path("/proc/self/task").iterdir())) > 1:  # Landlock restricts only the calling thread
            raise OSError(errno.EBUSY, "a helper confines itself before it starts threads")
    program = (gate_filter if kind == "gate" else resolver_filter)(host_arch())
    if kind == "resolver":
        import encodings.idna  # noqa: F401 - getaddrinfo would import it later, when its file is out of reach
    if uid is not None:
        os.setgroups([])
    # An ordinary user may not change the bounding set; without new privileges it is harmless.
    with contextlib.suppress(*([PermissionError] if uid is None else [])):
        kernel.drop_bounding_set()
    if uid is not None:
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    with contextlib.suppress(OSError):  # older kernels have no ambient set; capset clears it as well
        kernel.prctl(kernel.PR_CAP_AMBIENT, kernel.PR_CAP_AMBIENT_CLEAR_ALL)
    kernel.drop_capabilities()
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)  # after the change of uid, which resets it
    _limit(kind)
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    version = _landlock(kind)
    kernel.load_filter(program)
    walls = ["own uid"] if uid is not None else []
    walls += ["no capabilities", "no new privileges"]
    walls += [f"Landlock {version}"] if version else []
    return (*walls, "seccomp")


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
