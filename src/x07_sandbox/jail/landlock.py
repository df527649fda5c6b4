"""The jail's second form, for hosts where namespaces are forbidden: building its command line and filter is pure.

Landlock and seccomp replace bubblewrap's namespaces (docs/explanation/design.md, "The jail"). They are set up
by data/landlock.pl in the process that becomes the VMM:

Landlock   opens no file but the VMM's own, its libraries, its firmware and the descriptors that it was given, and
           these only as far as it needs them.
seccomp    lists the system calls that QEMU makes, and refuses all others. Those that take the number of a process
           take only the VMM's own; none makes a socket or a process, changes a file's mode, owner or times, or
           executes anything once the VMM has started.

There is no root of its own, so the files that come as descriptors are opened by way of /proc/self/fd. As root all of
it, the supervisor too, runs under the job's own uid.
"""

from __future__ import annotations

import errno
import secrets
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from x07_sandbox.host.arch import host_arch
from x07_sandbox.jail.bwrap import PERL, Jail, supervisor_argv
from x07_sandbox.jail.seccomp import (
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
    from x07_sandbox.host.arch import Arch

CONFINER: Final = Path(__file__).with_name("data") / "landlock.pl"
# From this version on truncating is a right of its own; before, a file that may be read only could be emptied.
VERSION_NEEDED: Final = 3
KERNEL_NEEDED: Final = "Linux 6.2"

_EXECUTE, _WRITE_FILE, _READ_FILE, _TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 14
_TCP: Final = 1 << 0 | 1 << 1  # bind, connect
_TCP_SINCE: Final = 4
_SCOPES: Final = 1 << 0 | 1 << 1  # abstract Unix sockets and processes outside
_SCOPES_SINCE: Final = 6
_FILE_RIGHTS: Final = {3: (1 << 15) - 1, 5: (1 << 16) - 1}  # ioctl on devices came with version 5
_SETUP_CALLS: Final = ("close_range", "mmap", "read", "execve", "prctl", "seccomp", "prlimit64")

CALLS: Final = (
    # data through descriptors that are open
    *("read", "write", "readv", "writev", "pread64", "pwrite64", "preadv", "pwritev", "lseek", "close", "close_range"),
    *("dup", "dup3", "fstat", "fstatfs", "ftruncate", "fallocate", "fsync", "fdatasync"),
    *("sync_file_range", "fadvise64"),
    # whether a file may be read, by its path: how QEMU looks for its firmware
    "faccessat",
    *("sendto", "sendmsg", "recvfrom", "recvmsg", "shutdown", "getsockname", "getpeername", "getsockopt", "setsockopt"),
    *("pipe2", "eventfd2", "signalfd4"),
    # waiting
    *("epoll_create1", "epoll_ctl", "epoll_pwait", "epoll_pwait2", "ppoll", "pselect6", "futex", "membarrier"),
    *("nanosleep", "clock_nanosleep", "clock_gettime", "clock_getres", "gettimeofday", "sched_yield"),
    *("timer_create", "timer_settime", "timer_gettime", "timer_getoverrun", "timer_delete"),
    *("timerfd_create", "timerfd_settime", "timerfd_gettime"),
    # this process's memory, threads, signal handlers and end
    *("mmap", "munmap", "mprotect", "mremap", "madvise", "mincore", "msync", "brk"),
    *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "rt_sigtimedwait", "rt_sigsuspend", "sigaltstack"),
    *("set_robust_list", "rseq", "set_tid_address", "restart_syscall", "exit", "exit_group", "seccomp"),
    # facts about this process and the machine
    *("getpid", "getppid", "gettid", "getuid", "geteuid", "getgid", "getegid", "getresuid", "getresgid", "getgroups"),
    *("getrandom", "getrusage", "sched_getaffinity", "sysinfo", "capget"),
)
CALLS_OLD: Final = ("epoll_wait", "poll", "select", "arch_prctl", "pause", "access")

_ARG0, _ARG1, _ARG2, _ARG3 = 0, 2, 4, 6
_UPPER: Final = 1  # added to one of them: the upper half
_AT_EMPTY_PATH: Final = 0x1000
_TMPFILE: Final = 0x400000  # the bit of O_TMPFILE that is its own
_FCNTL: Final = (0, 1, 2, 3, 4, 1030)  # F_DUPFD to F_SETFL, F_DUPFD_CLOEXEC: no locks, leases, owners or notices
_PR_SET_NAME, _PR_SET_TIMERSLACK, _PR_SET_NO_NEW_PRIVS, _PR_GET_NO_NEW_PRIVS = 15, 29, 38, 39
_PR_GET_SECCOMP: Final = 21
_KVM: Final = 0xAE00  # the type of KVM's requests
# FIONREAD, FIONBIO, FIONCLEX, FIOCLEX. Not those that name a process to be sent signals.
_REQUESTS: Final = (0x541B, 0x5421, 0x5450, 0x5451)
_LOWEST, _HIGHEST = 0x100000000000, 0x500000000000  # where nothing is mapped by itself


class Places(msgspec.Struct, frozen=True):
    """Where the command's path, arguments and environment lie when it is executed: drawn for each job."""

    path: int
    arguments: int
    environment: int


def places() -> Places:
    """Three addresses that nobody guesses."""
    step = 8  # what the kernel and perl want pointers aligned to
    return Places(*(_LOWEST + step * secrets.randbelow((_HIGHEST - _LOWEST) // step) for _ in range(3)))


def landlock_argv(jail: Jail, command: list[str], version: int) -> list[str]:
    """The whole command line: supervisor, the script that confines, *command*. version: the kernel's Landlock."""
    kept = [fd for fd, _ in (*jail.fd_files, *jail.fd_writable)] + list(jail.fds)
    numbers = (str(jail.syscalls[name]) for name in _SETUP_CALLS)
    rules = [word for file, rights in file_rights(jail, command[0]).items() for word in (file, str(rights))]
    variables = [f"X07_INSTANCE={jail.mark}", "MALLOC_ARENA_MAX=1"]  # as in the first form
    script = [str(CONFINER)] if jail.uid is None else ["-e", CONFINER.read_text(encoding="utf-8"), "--"]
    argv = [PERL, *script, str(jail.filter_fd), ",".join(map(str, kept)), ruleset(version).hex(), *numbers]
    limits = [str(number) for which, values in jail.limits.items() for number in (which, *values)]
    argv += [str(len(limits)), *limits, str(len(rules)), *rules, str(len(variables)), *variables, *command]
    return supervisor_argv(
        argv,
        deadline_s=jail.deadline_s,
        runner_pid=jail.runner_pid,
        syscalls=jail.syscalls,
        nest=False,
        keep_fd=jail.lock_fd,
        uid=jail.uid,
    )


def ruleset(version: int) -> bytes:
    """What Landlock is to decide about, struct landlock_ruleset_attr: all that this version can."""
    files = max(rights for since, rights in _FILE_RIGHTS.items() if since <= version)
    return struct.pack("=QQQ", files, _TCP if version >= _TCP_SINCE else 0, _SCOPES if version >= _SCOPES_SINCE else 0)


def file_rights(jail: Jail, program: str) -> dict[str, int]:
    """What may be done with each file, by its path or the number of its descriptor."""
    rights = dict.fromkeys((*jail.files, *jail.devices), _READ_FILE)
    for path in rights.keys() & {program, host_arch().loader}:
        rights[path] |= _EXECUTE
    rights |= {str(fd): _READ_FILE for fd, _ in jail.fd_files}
    return rights | {str(fd): _READ_FILE | _WRITE_FILE | _TRUNCATE for fd, _ in jail.fd_writable}


def release_message(arch: Arch, pid: int) -> bytes:
    """What lets the jail go: the places of the command, and the filter for the process *pid* that becomes it."""
    drawn = places()
    program = landlock_filter(arch, pid, drawn)
    return struct.pack("=QQQQ", drawn.path, drawn.arguments, drawn.environment, len(program)) + program


def landlock_filter(arch: Arch, pid: int, drawn: Places) -> bytes:
    """The seccomp filter, an array of struct sock_filter: see CALLS."""
    number = arch.syscalls
    instead = {
        "clone3": errno.ENOSYS,  # its flags lie in memory, where no filter can see them; the C library takes clone
        "socket": errno.EAFNOSUPPORT,
        "kill": errno.ESRCH,  # as in a pid namespace of its own: whether there is such a process is not told
    }
    first = []
    for name, code in instead.items():
        first += [line(JEQ, number[name], 0, 1), line(RETURN, ERRNO | code)]
    return allowing(arch, (*CALLS, *CALLS_OLD), call_rules(pid, drawn), first)


def call_rules(pid: int, drawn: Places) -> Rules:
    """Conditions on the calls that are allowed only so."""
    halves = [half for place in msgspec.structs.astuple(drawn) for half in (place & 0xFFFFFFFF, place >> 32)]
    return {
        "execve": (tuple(Check(word, (half,)) for word, half in enumerate(halves)),),
        # For waking a thread of its own. pid 0 is no process here.
        "tgkill": ((Check(_ARG0, (pid,)),),),
        "clone": ((Check(_ARG0, (CLONE_THREAD,), CLONE_THREAD | CLONE_NEW),),),
        "fcntl": ((Check(_ARG1, _FCNTL),),),
        "ioctl": ((Check(_ARG1, _REQUESTS),), (Check(_ARG1, (_KVM,), 0xFF00),)),
        # Landlock decides what may be opened and how, and that nothing is made; this is for files without a name.
        "openat": ((Check(_ARG2, (0,), _TMPFILE),),),
        "open": ((Check(_ARG1, (0,), _TMPFILE),),),
        "newfstatat": ((Check(_ARG3, (_AT_EMPTY_PATH,)),),),
        "prctl": (
            (Check(_ARG0, (_PR_SET_NAME, _PR_SET_TIMERSLACK, _PR_SET_NO_NEW_PRIVS, _PR_GET_NO_NEW_PRIVS)),),
            (Check(_ARG0, (_PR_GET_SECCOMP,)),),
        ),
        # Reading its own limits: pid 0, and no address of new ones.
        "prlimit64": ((Check(_ARG0, (0,)), Check(_ARG2, (0,)), Check(_ARG2 + _UPPER, (0,))),),
    }
