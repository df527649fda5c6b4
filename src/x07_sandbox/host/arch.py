"""The one table of what depends on the machine's architecture. Only x86_64 has been run."""

from __future__ import annotations

import os

import msgspec

from x07_sandbox.errors import HostError


class Arch(msgspec.Struct, frozen=True, kw_only=True):
    """Names and switches of one architecture.

    firmware: paths below /usr/share that the machine type reads at start, which firmware_packages bring.
    emulated_cpu: QEMU's model. Without erms and fsrm the guest's kernel copies by words: QEMU emulates `rep movsb` byte
        by byte, and copies, fresh pages and files took three to five times as long (docs/explanation/performance.md).
    initrd_tail_bytes: how much of its last page an initramfs has to fill (backends/qemu/machine); None for any.
    """

    name: str  # as the kernel says it: uname -m
    deb: str  # Debian's name
    qemu_binary: str
    qemu_package: str
    machine: str
    emulated_cpu: str
    firmware: tuple[str, ...]
    firmware_packages: tuple[str, ...]
    initrd_tail_bytes: int | None
    kernel_package: str
    multiarch: str
    loader: str  # the dynamic loader's path
    audit: int  # linux/audit.h: AUDIT_ARCH_*
    elf_machine: int  # elf.h: EM_*
    syscalls: dict[str, int]
    tested: bool


# Numbers of the system calls that the jail's filters and its supervisor name, and the guest (a test compares them with
# libseccomp's, another the guest's own with these).
# fmt: off
_X86_64_CALLS = {
    "access": 21, "add_key": 248, "arch_prctl": 158, "bind": 49, "bpf": 321, "brk": 12, "capget": 125, "capset": 126,
    "chroot": 161, "clock_getres": 229, "clock_gettime": 228, "clock_nanosleep": 230, "clone": 56, "clone3": 435,
    "close": 3, "close_range": 436, "connect": 42, "dup": 32, "dup3": 292, "epoll_create1": 291, "epoll_ctl": 233,
    "epoll_pwait": 281, "epoll_pwait2": 441, "epoll_wait": 232, "eventfd2": 290, "execve": 59, "exit": 60,
    "exit_group": 231, "faccessat": 269, "faccessat2": 439, "fadvise64": 221, "fallocate": 285, "fanotify_init": 300,
    "fcntl": 72, "fdatasync": 75, "flock": 73, "fork": 57, "fsconfig": 431, "fsmount": 432, "fsopen": 430,
    "fspick": 433, "fstat": 5, "fstatfs": 138, "fsync": 74, "ftruncate": 77, "futex": 202, "getcwd": 79,
    "getdents64": 217, "getegid": 108, "geteuid": 107, "getgid": 104, "getgroups": 115, "getpeername": 52, "getpid": 39,
    "getppid": 110, "getrandom": 318, "getresgid": 120, "getresuid": 118, "getrusage": 98, "getsockname": 51,
    "getsockopt": 55, "gettid": 186, "gettimeofday": 96, "getuid": 102, "inotify_init": 253, "inotify_init1": 294,
    "io_setup": 206, "io_uring_setup": 425, "ioctl": 16, "kcmp": 312, "keyctl": 250, "kill": 62, "lseek": 8, "lstat": 6,
    "madvise": 28, "membarrier": 324, "memfd_create": 319, "memfd_secret": 447, "mincore": 27, "mmap": 9, "mount": 165,
    "mount_setattr": 442, "move_mount": 429, "mprotect": 10, "mremap": 25, "msgget": 68, "msync": 26, "munmap": 11,
    "nanosleep": 35, "newfstatat": 262, "open": 2, "open_by_handle_at": 304, "open_tree": 428, "openat": 257,
    "pause": 34, "perf_event_open": 298, "pidfd_getfd": 438, "pipe2": 293, "pivot_root": 155, "poll": 7, "ppoll": 271,
    "prctl": 157, "pread64": 17, "preadv": 295, "prlimit64": 302, "process_vm_readv": 310, "process_vm_writev": 311,
    "pselect6": 270, "ptrace": 101, "pwrite64": 18, "pwritev": 296, "read": 0, "readlink": 89, "readlinkat": 267,
    "readv": 19, "recvfrom": 45, "recvmsg": 47, "request_key": 249, "restart_syscall": 219, "rseq": 334,
    "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "rt_sigsuspend": 130, "rt_sigtimedwait": 128,
    "sched_getaffinity": 204, "sched_yield": 24, "seccomp": 317, "select": 23, "semget": 64, "sendmmsg": 307,
    "sendmsg": 46, "sendto": 44, "set_robust_list": 273, "set_tid_address": 218, "setns": 308, "setsockopt": 54,
    "shmget": 29, "shutdown": 48, "sigaltstack": 131, "signalfd4": 289, "socket": 41, "socketpair": 53, "stat": 4,
    "statx": 332, "sync_file_range": 277, "sysinfo": 99, "tgkill": 234, "timer_create": 222, "timer_delete": 226,
    "timer_getoverrun": 225, "timer_gettime": 224, "timer_settime": 223, "timerfd_create": 283, "timerfd_gettime": 287,
    "timerfd_settime": 286, "umount2": 166, "uname": 63, "unshare": 272, "userfaultfd": 323, "vfork": 58, "write": 1,
    "writev": 20,
}
_AARCH64_CALLS = {
    "add_key": 217, "bind": 200, "bpf": 280, "brk": 214, "capget": 90, "capset": 91, "chroot": 51, "clock_getres": 114,
    "clock_gettime": 113, "clock_nanosleep": 115, "clone": 220, "clone3": 435, "close": 57, "close_range": 436,
    "connect": 203, "dup": 23, "dup3": 24, "epoll_create1": 20, "epoll_ctl": 21, "epoll_pwait": 22, "epoll_pwait2": 441,
    "eventfd2": 19, "execve": 221, "exit": 93, "exit_group": 94, "faccessat": 48, "faccessat2": 439, "fadvise64": 223,
    "fallocate": 47, "fanotify_init": 262, "fcntl": 25, "fdatasync": 83, "flock": 32, "fsconfig": 431, "fsmount": 432,
    "fsopen": 430, "fspick": 433, "fstat": 80, "fstatfs": 44, "fsync": 82, "ftruncate": 46, "futex": 98, "getcwd": 17,
    "getdents64": 61, "getegid": 177, "geteuid": 175, "getgid": 176, "getgroups": 158, "getpeername": 205,
    "getpid": 172, "getppid": 173, "getrandom": 278, "getresgid": 150, "getresuid": 148, "getrusage": 165,
    "getsockname": 204, "getsockopt": 209, "gettid": 178, "gettimeofday": 169, "getuid": 174, "inotify_init1": 26,
    "io_setup": 0, "io_uring_setup": 425, "ioctl": 29, "kcmp": 272, "keyctl": 219, "kill": 129, "lseek": 62,
    "madvise": 233, "membarrier": 283, "memfd_create": 279, "memfd_secret": 447, "mincore": 232, "mmap": 222,
    "mount": 40, "mount_setattr": 442, "move_mount": 429, "mprotect": 226, "mremap": 216, "msgget": 186, "msync": 227,
    "munmap": 215, "nanosleep": 101, "newfstatat": 79, "open_by_handle_at": 265, "open_tree": 428, "openat": 56,
    "perf_event_open": 241, "pidfd_getfd": 438, "pipe2": 59, "pivot_root": 41, "ppoll": 73, "prctl": 167, "pread64": 67,
    "preadv": 69, "prlimit64": 261, "process_vm_readv": 270, "process_vm_writev": 271, "pselect6": 72, "ptrace": 117,
    "pwrite64": 68, "pwritev": 70, "read": 63, "readlinkat": 78, "readv": 65, "recvfrom": 207, "recvmsg": 212,
    "request_key": 218, "restart_syscall": 128, "rseq": 293, "rt_sigaction": 134, "rt_sigprocmask": 135,
    "rt_sigreturn": 139, "rt_sigsuspend": 133, "rt_sigtimedwait": 137, "sched_getaffinity": 123, "sched_yield": 124,
    "seccomp": 277, "semget": 190, "sendmmsg": 269, "sendmsg": 211, "sendto": 206, "set_robust_list": 99,
    "set_tid_address": 96, "setns": 268, "setsockopt": 208, "shmget": 194, "shutdown": 210, "sigaltstack": 132,
    "signalfd4": 74, "socket": 198, "socketpair": 199, "statx": 291, "sync_file_range": 84, "sysinfo": 179,
    "tgkill": 131, "timer_create": 107, "timer_delete": 111, "timer_getoverrun": 109, "timer_gettime": 108,
    "timer_settime": 110, "timerfd_create": 85, "timerfd_gettime": 87, "timerfd_settime": 86, "umount2": 39,
    "uname": 160, "unshare": 97, "userfaultfd": 282, "write": 64, "writev": 66,
}
# fmt: on

ARCHES: dict[str, Arch] = {
    "x86_64": Arch(
        name="x86_64",
        deb="amd64",
        qemu_binary="/usr/bin/qemu-system-x86_64",
        qemu_package="qemu-system-x86",
        machine="microvm",
        emulated_cpu="max,-erms,-fsrm",
        firmware=(
            "/usr/share/seabios/bios-microvm.bin",
            "/usr/share/qemu/pvh.bin",
            "/usr/share/qemu/linuxboot_dma.bin",
        ),
        firmware_packages=("seabios", "qemu-system-data"),
        initrd_tail_bytes=4,
        kernel_package="linux-image-cloud-amd64",
        multiarch="x86_64-linux-gnu",
        loader="/lib64/ld-linux-x86-64.so.2",
        audit=0xC000003E,
        elf_machine=62,
        syscalls=_X86_64_CALLS,
        tested=True,
    ),
    "aarch64": Arch(
        name="aarch64",
        deb="arm64",
        qemu_binary="/usr/bin/qemu-system-aarch64",
        qemu_package="qemu-system-arm",
        machine="virt",
        emulated_cpu="max",
        firmware=(),
        firmware_packages=(),
        initrd_tail_bytes=None,
        kernel_package="linux-image-cloud-arm64",
        multiarch="aarch64-linux-gnu",
        loader="/lib/ld-linux-aarch64.so.1",
        audit=0xC00000B7,
        elf_machine=183,
        syscalls=_AARCH64_CALLS,
        tested=False,
    ),
}


def host_arch() -> Arch:
    """The row of this machine. Raises HostError where there is none."""
    name = os.uname().machine
    try:
        return ARCHES[name]
    except KeyError:
        why = f"only {', '.join(sorted(ARCHES))} have a row in host/arch.py"
        what = f"no virtual machine for architecture {name}"
        raise HostError(what, why, "Run x07 on one of these machines") from None
