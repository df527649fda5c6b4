"""Seccomp filter around a VMM, and the building blocks of the other filters. libseccomp compiles them.

Capabilities and namespaces leave these gaps, which the filter closes in both forms of the jail:

* new user namespaces, in which a process has every capability and reaches more of the kernel;
* other processes: bubblewrap's first process could be traced, and several processes would multiply each limit per
  process. So a VMM may only start threads;
* what namespaces do not separate: the session keyring, sockets beyond the network namespace (vsock), files by handle;
* what all jobs of a host share: the pool of asynchronous I/O (fs.aio-max-nr), which a loop of io_setup exhausts for
  root too, and locks, leases and notifications on the image's files. SECURITY.md lists the other shared things under
  side channels: which pages of these files are in memory, and futexes on a shared mapping of the files;
* memory that belongs to no process (memfd, System V): without a control group only the address space is limited.
"""

import errno
import itertools
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from x07_sandbox.host.arch import Arch
from x07_sandbox.host.verdicts import Verdict

DENIED: Final = (
    # namespaces and mounts
    *("unshare", "setns", "mount", "umount2", "pivot_root", "chroot", "move_mount", "open_tree"),
    *("fsopen", "fsmount", "fsconfig", "fspick", "mount_setattr", "open_by_handle_at"),
    # other processes
    *("fork", "vfork", "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "kcmp"),
    # keyrings, memory that belongs to no process
    *("add_key", "request_key", "keyctl", "memfd_create", "memfd_secret", "shmget", "semget", "msgget"),
    # large parts of the kernel that an emulator does not need
    *("bpf", "perf_event_open", "userfaultfd", "io_uring_setup"),
    # shared between jobs: asynchronous I/O, locks and notices on a file
    *("io_setup", "flock", "inotify_init", "inotify_init1", "fanotify_init"),
)
CLONE_THREAD: Final = 0x00010000
CLONE_NEW: Final = 0x7E020000  # every CLONE_NEW* flag of clone(2); NEWTIME is only in clone3
_AF_UNIX: Final = 1
_F_DUPFD_CLOEXEC: Final = 1030
_LOAD, _JUMP_IF_EQUAL, _RETURN, _KILL = 0x20, 0x15, 0x06, 0x80000000
_ARCH: Final = 4  # offset in struct seccomp_data
ALL_BITS: Final = 0xFFFFFFFF
ALL_64_BITS: Final = 0xFFFFFFFFFFFFFFFF


class Check(NamedTuple):
    """A condition on a system call's argument, by number: its bits in *mask* equal one of *values*.

    The kernel ignores the upper half of most arguments.
    """

    argument: int
    values: tuple[int, ...]
    mask: int = ALL_BITS


# By call: alternatives, each of checks that must all hold.
Rules = dict[str, tuple[tuple[Check, ...], ...]]
# (call, its errno or 0 if it is allowed, conditions that must all hold: (argument, mask, value under the mask))
_Rule = tuple[str, int, tuple[tuple[int, int, int], ...]]

TMPFILE: Final = 0x400000  # O_TMPFILE's own bit
REQUESTS: Final = (0x541B, 0x5421, 0x5450, 0x5451)  # FIONREAD, FIONBIO, FIONCLEX, FIOCLEX; none names a process
# F_DUPFD to F_SETFL, F_DUPFD_CLOEXEC: all that QEMU uses (strace); no locks, leases, owners, notices or hints.
_FCNTL: Final = Check(1, (0, 1, 2, 3, 4, _F_DUPFD_CLOEXEC))
_THREAD: Final = Check(0, (CLONE_THREAD,), CLONE_THREAD | CLONE_NEW)
COMMON_RULES: Final[Rules] = {
    "fcntl": ((_FCNTL,),),
    # Reading its own limits: pid 0, and no new limits.
    "prlimit64": ((Check(0, (0,)), Check(2, (0,), ALL_64_BITS)),),
}
FSTAT_ONLY: Final = ((Check(3, (0x1000,)),),)  # AT_EMPTY_PATH, for newfstatat
THREADS_ONLY: Final = ((_THREAD,),)  # for clone


def vmm_filter(arch: Arch) -> bytes:
    """Return the VMM's filter, an array of struct sock_filter. It is compiled once per boot. Raises OSError."""
    rules: list[_Rule] = [(name, errno.EPERM, ()) for name in DENIED]
    # Its flags are in memory, unseen by filters; the C library falls back on clone.
    rules.append(("clone3", errno.ENOSYS, ()))
    rules += [("clone", errno.EPERM, (other,)) for other in _others(_THREAD)]
    rules += [("fcntl", errno.EPERM, (other,)) for other in _others(_FCNTL)]
    rules += [("socket", errno.EAFNOSUPPORT, (other,)) for other in _others(Check(0, (_AF_UNIX,)))]
    stored = Verdict("jail-filter", key=[arch.name, rules])
    return bytes.fromhex(stored.read_or_make(lambda: {"code": _compiled(arch, 0, rules).hex()})["code"])


def allowlist_filter(arch: Arch, names: tuple[str, ...], rules: Rules, errors: dict[str, int]) -> bytes:
    """Return a filter that allows the calls *names*, and the calls in *rules* under their conditions. Raises OSError.

    Every other call fails with its error in *errors*, or with EPERM.
    """
    made: list[_Rule] = [(name, code, ()) for name, code in errors.items()]
    made += [(name, 0, ()) for name in names]
    for name, alternatives in rules.items():
        for checks in alternatives:
            choices = [[(check.argument, check.mask, value) for value in check.values] for check in checks]
            made += [(name, 0, held) for held in itertools.product(*choices)]
    return _compiled(arch, errno.EPERM, made)


# Older variants of some calls, such as poll, are missing on newer architectures.
VMM_CALLS: Final = (
    # data through open descriptors
    *("read", "write", "readv", "writev", "pread64", "pwrite64", "preadv", "pwritev", "lseek", "close", "close_range"),
    *("dup", "dup3", "fstat", "fstatfs", "ftruncate", "fallocate", "fsync", "fdatasync"),
    *("sync_file_range", "fadvise64"),
    # how QEMU looks for its firmware
    *("faccessat", "access"),
    *("sendto", "sendmsg", "recvfrom", "recvmsg", "shutdown", "getsockname", "getpeername", "getsockopt", "setsockopt"),
    *("pipe2", "eventfd2", "signalfd4"),
    # waiting
    *("epoll_create1", "epoll_ctl", "epoll_pwait", "epoll_pwait2", "ppoll", "pselect6", "futex", "membarrier"),
    *("epoll_wait", "poll", "select", "pause"),
    *("nanosleep", "clock_nanosleep", "clock_gettime", "clock_getres", "gettimeofday", "sched_yield"),
    *("timer_create", "timer_settime", "timer_gettime", "timer_getoverrun", "timer_delete"),
    *("timerfd_create", "timerfd_settime", "timerfd_gettime"),
    # this process's memory, threads, signal handlers and end
    *("mmap", "munmap", "mprotect", "mremap", "madvise", "mincore", "msync", "brk"),
    *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "rt_sigtimedwait", "rt_sigsuspend", "sigaltstack"),
    *("set_robust_list", "rseq", "set_tid_address", "restart_syscall", "exit", "exit_group", "seccomp"),
    "arch_prctl",
    # facts about this process and the machine
    *("getpid", "getppid", "gettid", "getuid", "geteuid", "getgid", "getegid", "getresuid", "getresgid", "getgroups"),
    *("getrandom", "getrusage", "sched_getaffinity", "sysinfo", "capget"),
)

_PR_SET_NAME, _PR_SET_TIMERSLACK, _PR_SET_NO_NEW_PRIVS, _PR_GET_NO_NEW_PRIVS = 15, 29, 38, 39
_PR_GET_SECCOMP: Final = 21
_KVM: Final = 0xAE00  # the type of KVM's requests
VMM_ERRORS: Final = {
    "clone3": errno.ENOSYS,  # its flags are in memory, unseen by filters; the C library falls back on clone
    "socket": errno.EAFNOSUPPORT,
    "kill": errno.ESRCH,  # as in a pid namespace: no process is visible
}


def restored_filter(arch: Arch, pid: int) -> bytes:
    """Return the filter of a restored VMM with this pid in its namespace (jail/bwrap). It executes nothing.

    It allows less than the filters of a started VMM, the jail's and QEMU's own. It is compiled once per boot.
    Raises OSError.
    """
    rules = vmm_rules(pid)
    stored = Verdict("restored-filter", key=[arch.name, VMM_CALLS, rules, VMM_ERRORS])
    made = stored.read_or_make(lambda: {"code": allowlist_filter(arch, VMM_CALLS, rules, VMM_ERRORS).hex()})
    return bytes.fromhex(made["code"])


def vmm_rules(pid: int) -> Rules:
    """Return conditions for calls that are allowed only with certain arguments."""
    return {
        **COMMON_RULES,
        # To wake one of its own threads. There is no process 0.
        "tgkill": ((Check(0, (pid,)),),),
        "clone": THREADS_ONLY,
        "ioctl": ((Check(1, REQUESTS),), (Check(1, (_KVM,), 0xFF00),)),
        # Landlock decides what may be opened and how; this excludes unnamed files.
        "openat": ((Check(2, (0,), TMPFILE),),),
        "open": ((Check(1, (0,), TMPFILE),),),
        "newfstatat": FSTAT_ONLY,
        "prctl": (
            (Check(0, (_PR_SET_NAME, _PR_SET_TIMERSLACK, _PR_SET_NO_NEW_PRIVS, _PR_GET_NO_NEW_PRIVS)),),
            (Check(0, (_PR_GET_SECCOMP,)),),
        ),
    }


def _others(check: Check) -> Iterator[tuple[int, int, int]]:
    """Yield conditions (argument, mask, value) of which one holds exactly where *check* does not hold."""
    seen = 0
    for bit in (1 << number for number in reversed(range(32)) if check.mask >> number & 1):
        begins = {value & seen for value in check.values}
        seen |= bit
        listed = {value & seen for value in check.values}
        yield from (
            (check.argument, seen, begin | way) for begin in begins for way in (0, bit) if begin | way not in listed
        )


def _compiled(arch: Arch, default: int, rules: list[_Rule]) -> bytes:
    from x07_sandbox.libseccomp import ALLOW, ERRNO, MASKED_EQUAL, compile_filter  # not needed by most runs

    def action(code: int) -> int:
        return ERRNO | code if code else ALLOW

    full = [
        (name, action(code), tuple((argument, MASKED_EQUAL, mask, value) for argument, mask, value in held))
        for name, code, held in rules
    ]
    # libseccomp has one answer for x32 and for other architectures. These instructions kill the latter first.
    begin = ((_LOAD, 0, 0, _ARCH), (_JUMP_IF_EQUAL, 1, 0, arch.audit), (_RETURN, 0, 0, _KILL))
    return b"".join(struct.pack("=HBBI", *line) for line in begin) + compile_filter(action(default), full, arch.audit)
