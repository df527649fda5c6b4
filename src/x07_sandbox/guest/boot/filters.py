"""Compile the guest's seccomp filters with libseccomp; run by the guest image's own interpreter.

    python3 -I -S filters.py TARGET

The program writes one BPF file per filter to the folder TARGET. The filters `base` and `quiet` are for every program.
Every other filter forbids one combination of threads, new processes and execution. The file calls.json has the numbers
of audited and of refused system calls.

Each filter that forbids execve also has a variant "-once". It allows an execve call that has a 24-byte secret in three
arguments which the kernel ignores. The process that becomes the program writes the secret over `MARKERS`.
"""

import ctypes
import errno
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "agent"))  # the guest's code, while an image is built

from x07_sandbox.libseccomp import ALLOW, EQUAL, ERRNO, GREATER, MASKED_EQUAL, NOT_EQUAL, Rule, compile_filter

EPERM = ERRNO | errno.EPERM
ENOSYS = ERRNO | errno.ENOSYS
EAFNOSUPPORT = ERRNO | errno.EAFNOSUPPORT
EPROTONOSUPPORT = ERRNO | errno.EPROTONOSUPPORT

# Calls that no program needs, or that the kernel denies to ordinary users anyway; most are known attack surface.
DENIED = (
    # mounts and roots
    *("mount", "umount2", "pivot_root", "chroot", "move_mount", "open_tree", "fsopen", "fsmount", "fsconfig"),
    *("fspick", "mount_setattr", "swapon", "swapoff", "quotactl", "quotactl_fd", "acct"),
    # the kernel itself
    *("init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot", "syslog", "vhangup"),
    *("clock_settime", "settimeofday", "clock_adjtime", "iopl", "ioperm", "uselib"),
    # other processes
    *("ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "kcmp", "setns"),
    # keyrings, files by handle, file system notifications
    *("add_key", "request_key", "keyctl", "open_by_handle_at", "name_to_handle_at", "fanotify_init", "fanotify_mark"),
    # large and young parts of the kernel; executable memory outside any file system
    *("bpf", "perf_event_open", "userfaultfd", "io_uring_enter", "io_uring_register"),
    *("memfd_create", "memfd_secret", "lookup_dcookie"),
)
# Calls that are audited when denied: they name files, use descriptors, raise limits, or connect.
AUDITED = (
    *("open", "openat", "openat2", "creat", "mkdir", "mkdirat", "rmdir", "unlink", "unlinkat", "mknod", "mknodat"),
    *("rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat", "truncate", "chmod", "fchmodat"),
    *("fchmodat2", "chown", "lchown", "fchownat", "utimensat", "execve", "execveat", "chdir", "stat", "lstat"),
    *("newfstatat", "statx", "readlink", "readlinkat", "fchmod", "ftruncate", "setxattr"),
    *("setrlimit", "prlimit64"),
    *("fsetxattr", "lsetxattr", "removexattr", "fremovexattr", "lremovexattr", "bind"),
    *("socket", "socketpair", "accept", "accept4", "pipe", "pipe2", "dup", "dup2", "dup3", "fcntl", "epoll_create"),
    *("epoll_create1", "eventfd2", "timerfd_create", "inotify_init1"),
    *("connect", "sendto", "sendmsg", "sendmmsg"),
)
CLONE_THREAD = 0x00010000
# NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET; and NEWTIME for unshare only (in clone it is a signal bit).
CLONE_NEW = (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)
CLONE_NEWTIME = 0x80
FAMILIES = frozenset({0, 1, 2, 10, 16})  # none, AF_UNIX, AF_INET, AF_INET6, AF_NETLINK
AF_NETLINK = 16
NETLINK_ROUTE = 0  # the C library reads addresses from it
IOCTLS = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX: inject terminal input
AT_EMPTY_PATH = 0x1000
PERSONALITIES = 0x00020008  # PER_LINUX32 and UNAME26 only change what uname says
MARKERS = (0x5AFE70115AFE7012, 0x5AFE70135AFE7014, 0x5AFE70155AFE7016)


def base_rules() -> list[Rule]:
    """Return the rules for every program."""
    rules: list[Rule] = [(name, EPERM, ()) for name in DENIED]
    rules += [("clone", EPERM, ((0, MASKED_EQUAL, flag, flag),)) for flag in CLONE_NEW]
    rules += [("unshare", EPERM, ((0, MASKED_EQUAL, flag, flag),)) for flag in (*CLONE_NEW, CLONE_NEWTIME)]
    rules.append(("execveat", EPERM, ((4, MASKED_EQUAL, AT_EMPTY_PATH, AT_EMPTY_PATH),)))
    # The kernel uses the lower 32 bits of these; comparing all 64 would let a value with a high bit pass.
    rules += [("ioctl", EPERM, ((1, MASKED_EQUAL, 0xFFFFFFFF, number),)) for number in IOCTLS]
    # All ones is a query; any other value with more than the harmless bits changes the memory layout.
    for bit in (1 << number for number in range(31)):
        if not bit & PERSONALITIES:
            rules.append(("personality", EPERM, ((0, MASKED_EQUAL, 1 << 31 | bit, bit),)))
        rules.append(("personality", EPERM, ((0, MASKED_EQUAL, 1 << 31 | bit, 1 << 31),)))
    for name in ("socket", "socketpair"):
        rules.append((name, EAFNOSUPPORT, ((0, GREATER, max(FAMILIES), 0),)))
        rules += [
            (name, EAFNOSUPPORT, ((0, EQUAL, family, 0),)) for family in range(max(FAMILIES)) if family not in FAMILIES
        ]
        rules.append((name, EPROTONOSUPPORT, ((0, EQUAL, AF_NETLINK, 0), (2, NOT_EQUAL, NETLINK_ROUTE, 0))))
    return rules


def quiet_rules() -> list[Rule]:
    """Return the rules for calls that are refused without an audit record.

    Ordinary programs try these calls and have a fallback. A filter cannot see the flags of clone3, which are in memory;
    the C library falls back to clone. libuv (node) falls back from io_uring to epoll.
    """
    return [("clone3", ENOSYS, ()), ("io_uring_setup", EPERM, ())]


def forbidding(*, threads: bool, spawn: bool, execute: bool, once: bool) -> list[Rule]:
    """Return the rules that forbid what the arguments select. once: still allow the execve call with the secret."""
    rules: list[Rule] = []
    if threads:
        rules.append(("clone", EPERM, ((0, MASKED_EQUAL, CLONE_THREAD, CLONE_THREAD),)))
    if spawn:
        rules += [("fork", EPERM, ()), ("vfork", EPERM, ()), ("clone", EPERM, ((0, MASKED_EQUAL, CLONE_THREAD, 0),))]
    if execute:
        rules.append(("execveat", EPERM, ()))
        if once:
            rules += [("execve", EPERM, ((number, NOT_EQUAL, marker, 0),)) for number, marker in enumerate(MARKERS, 3)]
        else:
            rules.append(("execve", EPERM, ()))
    return rules


def all_rules() -> dict[str, list[Rule]]:
    """Return the rules of every filter, by name."""
    found = {"base": base_rules(), "quiet": quiet_rules()}
    for threads, spawn, execute in itertools.product((False, True), repeat=3):
        words = ("no-threads" * threads, "no-spawn" * spawn, "no-exec" * execute)
        if name := "-".join(word for word in words if word):
            found[name] = forbidding(threads=threads, spawn=spawn, execute=execute, once=False)
            if execute:
                found[f"{name}-once"] = forbidding(threads=threads, spawn=spawn, execute=True, once=True)
    return found


def call_numbers() -> dict[str, dict[str, int]]:
    """Return the numbers, on this architecture, of audited calls and of calls that filters refuse."""
    library = ctypes.CDLL("libseccomp.so.2")
    refused = sorted({name for rules in all_rules().values() for name, _, _ in rules})
    found = {"audited": AUDITED, "refused": refused}
    numbers = {name: library.seccomp_syscall_resolve_name(name.encode()) for names in found.values() for name in names}
    return {key: {name: numbers[name] for name in names if numbers[name] >= 0} for key, names in found.items()}


def main(target: str) -> None:
    """Write calls.json and one BPF file per filter to the folder *target*."""
    Path(target, "calls.json").write_text(json.dumps(call_numbers()), encoding="utf-8")
    for name, rules in all_rules().items():
        Path(target, f"{name}.bpf").write_bytes(compile_filter(ALLOW, rules))


if __name__ == "__main__":
    main(*sys.argv[1:])
