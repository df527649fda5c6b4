"""Seccomp filter around a VMM, and the building blocks of the other filters. Pure.

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

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from x07_sandbox.host.arch import Arch

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
_X32: Final = 0x40000000  # x86-64's second set of call numbers

# Offsets in struct seccomp_data; an argument has 8 bytes, the low half first (our machines are little-endian).
_NR, _ARCH, _ARGUMENTS = 0, 4, 16
LOAD, JEQ, _JGE, RETURN = 0x20, 0x15, 0x35, 0x06
ALLOW: Final = 0x7FFF0000
_KILL: Final = 0x80000000
ERRNO: Final = 0x00050000
_AND: Final = 0x54
ALL_BITS: Final = 0xFFFFFFFF


class Check(NamedTuple):
    """A condition on one half of a system call's argument: its bits in *mask* equal one of *values*.

    word: twice the argument's number, plus one for the upper half. The kernel ignores the upper half of most arguments.
    """

    word: int
    values: tuple[int, ...]
    mask: int = ALL_BITS


# By call: alternatives, each of checks that must all hold.
Rules = dict[str, tuple[tuple[Check, ...], ...]]

ARG0, ARG1, ARG2, ARG3 = 0, 2, 4, 6
TMPFILE: Final = 0x400000  # O_TMPFILE's own bit
REQUESTS: Final = (0x541B, 0x5421, 0x5450, 0x5451)  # FIONREAD, FIONBIO, FIONCLEX, FIOCLEX; none names a process
COMMON_RULES: Final[Rules] = {
    # F_DUPFD to F_SETFL, F_DUPFD_CLOEXEC: all that QEMU uses (strace); no locks, leases, owners, notices or hints.
    "fcntl": ((Check(ARG1, (0, 1, 2, 3, 4, _F_DUPFD_CLOEXEC)),),),
    # Reading its own limits: pid 0, and no new limits.
    "prlimit64": ((Check(ARG0, (0,)), Check(ARG2, (0,)), Check(ARG2 + 1, (0,))),),
}
FSTAT_ONLY: Final = ((Check(ARG3, (0x1000,)),),)  # AT_EMPTY_PATH, for newfstatat
THREADS_ONLY: Final = ((Check(ARG0, (CLONE_THREAD,), CLONE_THREAD | CLONE_NEW),),)  # for clone


def vmm_filter(arch: Arch) -> bytes:
    """Return the VMM's filter, an array of struct sock_filter."""
    numbers = arch.syscalls
    lines = prologue(arch)
    for name in DENIED:
        if name in numbers:  # not every machine has fork and vfork
            lines += [line(JEQ, numbers[name], 0, 1), line(RETURN, ERRNO | errno.EPERM)]
    # Its flags are in memory, unseen by filters; the C library falls back on clone.
    lines += [line(JEQ, numbers["clone3"], 0, 1), line(RETURN, ERRNO | errno.ENOSYS)]
    lines += _rule(numbers["clone"], THREADS_ONLY, errno.EPERM)
    lines += _rule(numbers["fcntl"], COMMON_RULES["fcntl"], errno.EPERM)
    lines += _rule(numbers["socket"], ((Check(ARG0, (_AF_UNIX,)),),), errno.EAFNOSUPPORT)
    return b"".join([*lines, line(RETURN, ALLOW)])


def prologue(arch: Arch) -> list[bytes]:
    """Return a filter's first instructions: kill on another architecture, refuse x32, load the call's number."""
    lines = [line(LOAD, _ARCH), line(JEQ, arch.audit, 1, 0), line(RETURN, _KILL), line(LOAD, _NR)]
    return [*lines, line(_JGE, _X32, 0, 1), line(RETURN, ERRNO | errno.ENOSYS)]


def line(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """Return one instruction, a struct sock_filter."""
    return struct.pack("=HBBI", code, if_true, if_false, value)


def allowlist_filter(arch: Arch, names: tuple[str, ...], rules: Rules, errors: dict[str, int]) -> bytes:
    """Return a filter that allows the calls *names*, and the calls in *rules* under their conditions.

    Every other call fails with its error in *errors*, or with EPERM.
    """
    numbers = arch.syscalls
    lines = prologue(arch)
    for name, code in errors.items():
        lines += [line(JEQ, numbers[name], 0, 1), line(RETURN, ERRNO | code)]
    for name in names:
        if name in numbers:
            lines += [line(JEQ, numbers[name], 0, 1), line(RETURN, ALLOW)]
    for name, conditions in rules.items():
        if name in numbers:
            lines += _rule(numbers[name], conditions, errno.EPERM)
    return b"".join([*lines, line(RETURN, ERRNO | errno.EPERM)])


def _rule(number: int, conditions: tuple[tuple[Check, ...], ...], error: int) -> list[bytes]:
    """Return the instructions that allow a call under any of *conditions*. Otherwise the call fails with *error*."""
    body = [instruction for checks in conditions for instruction in _condition(checks)]
    body.append(line(RETURN, ERRNO | error))
    return [line(JEQ, number, 0, len(body)), *body]


def _condition(checks: tuple[Check, ...]) -> list[bytes]:
    """Return the instructions that allow the call if all checks hold."""
    lines = [line(RETURN, ALLOW)]
    for check in reversed(checks):
        last = len(check.values) - 1
        compare = [line(JEQ, value, last - at, 0) for at, value in enumerate(check.values[:-1])]
        compare.append(line(JEQ, check.values[-1], 0, len(lines)))
        masked = [] if check.mask == ALL_BITS else [line(_AND, check.mask)]
        lines = [line(LOAD, _ARGUMENTS + 4 * check.word), *masked, *compare, *lines]
    return lines
