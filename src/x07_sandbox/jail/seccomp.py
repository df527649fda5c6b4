"""The filter of system calls around a VMM, as bytes for bubblewrap's --seccomp: building it is pure.

Capabilities and namespaces alone leave four ways open, which this closes in both forms of the jail:

* a new user namespace, in which its maker holds every capability, and with it far more of the kernel;
* other processes: bubblewrap's first one, which need not be under it, could be traced; and with several of its own a
  VMM would have every bound on one process as often, so it may start threads only;
* what namespaces do not part: the session keyring, which a child inherits from the user's login, sockets of families
  that reach past the network namespace (vsock), files by handle;
* what all jobs of a host share: the pool of asynchronous I/O (fs.aio-max-nr), which a loop of io_setup uses up for root
  too; and the image's files, on which locks, leases, hints and notices reach other jobs. The rest is left to
  SECURITY.md's side channels: which pages of those files are in memory, futexes on a shared mapping of them.

Memory that belongs to no process (memfd, System V) is refused too: where the host gives no control group, the limit
on the address space is the only one.
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
    # keyrings, and memory that belongs to no process
    *("add_key", "request_key", "keyctl", "memfd_create", "memfd_secret", "shmget", "semget", "msgget"),
    # large parts of the kernel that an emulator does without
    *("bpf", "perf_event_open", "userfaultfd", "io_uring_setup"),
    # what all jobs share: the host's pool of asynchronous I/O, and locks and notices on one file
    *("io_setup", "flock", "inotify_init", "inotify_init1", "fanotify_init"),
)
CLONE_THREAD: Final = 0x00010000
CLONE_NEW: Final = 0x7E020000  # every CLONE_NEW* flag of clone(2); NEWTIME exists in clone3 only
_AF_UNIX: Final = 1
# fcntl's commands from here on are locks (5 to 7, 36 to 38), leases (1024), notices (1026), hints (1036) and the like.
# QEMU needs, as strace shows for booting, saving and cloning, only those below and F_DUPFD_CLOEXEC.
_F_GETLK: Final = 5
_F_DUPFD_CLOEXEC: Final = 1030
_X32: Final = 0x40000000  # x86-64's second numbering of the same calls (the filter sees no other difference)

# struct seccomp_data: nr at 0, arch at 4, the low halves of the arguments from 16 on (our machines are little-endian).
_NR, _ARCH, _ARG0, _ARG1 = 0, 4, 16, 24
LOAD, JEQ, _JGE, _JSET, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW: Final = 0x7FFF0000
_KILL: Final = 0x80000000
ERRNO: Final = 0x00050000
_AND: Final = 0x54
_ARGUMENTS: Final = 16  # where they are in struct seccomp_data; 8 bytes each, the low half first
ALL_BITS: Final = 0xFFFFFFFF


class Check(NamedTuple):
    """A condition on one half of an argument: that its bits in *mask* are one of *values*.

    word: the half's number, twice that of the argument, and one more for the upper half. The kernel takes most of these
    arguments as 32 bits, so that nothing hides in the upper half.
    """

    word: int
    values: tuple[int, ...]
    mask: int = ALL_BITS


# By the name of a call, conditions of which one has to hold, each of several checks that have to hold together.
Rules = dict[str, tuple[tuple[Check, ...], ...]]


def vmm_filter(arch: Arch) -> bytes:
    """The program: an array of struct sock_filter."""
    nr = arch.syscalls
    lines = prologue(arch)
    for name in DENIED:
        if name in nr:  # fork and vfork are not on every machine
            lines += [line(JEQ, nr[name], 0, 1), line(RETURN, ERRNO | errno.EPERM)]
    # Its flags lie in memory, where no filter can see them; the C library falls back on clone.
    lines += [line(JEQ, nr["clone3"], 0, 1), line(RETURN, ERRNO | errno.ENOSYS)]
    lines += [line(JEQ, nr["clone"], 0, 5), line(LOAD, _ARG0), line(_JSET, CLONE_NEW, 1, 0)]
    lines += [line(_JSET, CLONE_THREAD, 1, 0), line(RETURN, ERRNO | errno.EPERM), line(RETURN, ALLOW)]
    # The kernel takes a command of 32 bits too, so nothing hides in the upper half.
    lines += [line(JEQ, nr["fcntl"], 0, 5), line(LOAD, _ARG1), line(_JGE, _F_GETLK, 0, 2)]
    lines += [line(JEQ, _F_DUPFD_CLOEXEC, 1, 0), line(RETURN, ERRNO | errno.EPERM), line(RETURN, ALLOW)]
    lines += [line(JEQ, nr["socket"], 0, 3), line(LOAD, _ARG0), line(JEQ, _AF_UNIX, 1, 0)]
    lines += [line(RETURN, ERRNO | errno.EAFNOSUPPORT), line(RETURN, ALLOW)]
    return b"".join(lines)


def prologue(arch: Arch) -> list[bytes]:
    """The first lines of a filter: other architectures are killed, x32 is refused, and the call's number is loaded."""
    lines = [line(LOAD, _ARCH), line(JEQ, arch.audit, 1, 0), line(RETURN, _KILL), line(LOAD, _NR)]
    return [*lines, line(_JGE, _X32, 0, 1), line(RETURN, ERRNO | errno.ENOSYS)]


def line(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One instruction: struct sock_filter."""
    return struct.pack("=HBBI", code, if_true, if_false, value)


def allowing(arch: Arch, names: tuple[str, ...], rules: Rules, first: list[bytes] | None = None) -> bytes:
    """Allow the calls of *names*, and those of *rules* under their conditions; EPERM for every other."""
    numbers = arch.syscalls
    lines = [*prologue(arch), *(first or [])]
    for name in names:
        if name in numbers:
            lines += [line(JEQ, numbers[name], 0, 1), line(RETURN, ALLOW)]
    for name, conditions in rules.items():
        if name in numbers:
            body = [instruction for checks in conditions for instruction in _condition(checks)]
            body.append(line(RETURN, ERRNO | errno.EPERM))
            lines += [line(JEQ, numbers[name], 0, len(body)), *body]
    return b"".join([*lines, line(RETURN, ERRNO | errno.EPERM)])


def _condition(checks: tuple[Check, ...]) -> list[bytes]:
    """Allow the call if all checks hold, else go on behind these lines."""
    lines = [line(RETURN, ALLOW)]
    for check in reversed(checks):
        last = len(check.values) - 1
        compare = [line(JEQ, value, last - at, 0) for at, value in enumerate(check.values[:-1])]
        compare.append(line(JEQ, check.values[-1], 0, len(lines)))
        masked = [] if check.mask == ALL_BITS else [line(_AND, check.mask)]
        lines = [line(LOAD, _ARGUMENTS + 4 * check.word), *masked, *compare, *lines]
    return lines
