"""Everything that depends on the machine's architecture. Only x86_64 has been tested."""

import os

import msgspec

from x07_sandbox.errors import HostError


class Arch(msgspec.Struct, frozen=True, kw_only=True):
    """Names and settings of one architecture."""

    name: str  # uname -m
    deb: str  # Debian's name
    qemu_binary: str
    qemu_package: str
    machine: str
    # QEMU's CPU model. QEMU emulates `rep movsb` byte by byte. Without erms and fsrm, the guest's kernel copies words,
    # which is three to five times faster (docs/explanation/performance.md).
    emulated_cpu: str
    firmware: tuple[str, ...]  # files from firmware_packages that the machine type reads at start
    firmware_packages: tuple[str, ...]
    initrd_tail_bytes: int | None  # how much of its last page an initramfs must fill (qemu/machine); None: any amount
    kernel_package: str
    multiarch: str
    loader: str  # the dynamic loader's path
    audit: int  # linux/audit.h: AUDIT_ARCH_*
    elf_machine: int  # elf.h: EM_*
    syscalls: dict[str, int]
    tested: bool


# System calls of the jail's filters and supervisor, and of the guest. Tests compare the numbers with libseccomp's.
# fmt: off
_CALLS = {  # x86_64, aarch64
    "access": (21, None), "add_key": (248, 217), "arch_prctl": (158, None), "bind": (49, 200), "bpf": (321, 280),
    "brk": (12, 214), "capget": (125, 90), "capset": (126, 91), "chroot": (161, 51), "clock_getres": (229, 114),
    "clock_gettime": (228, 113), "clock_nanosleep": (230, 115), "clone": (56, 220), "clone3": (435, 435),
    "close": (3, 57), "close_range": (436, 436), "connect": (42, 203), "dup": (32, 23), "dup3": (292, 24),
    "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_pwait": (281, 22), "epoll_pwait2": (441, 441),
    "epoll_wait": (232, None), "eventfd2": (290, 19), "execve": (59, 221), "exit": (60, 93), "exit_group": (231, 94),
    "faccessat": (269, 48), "faccessat2": (439, 439), "fadvise64": (221, 223), "fallocate": (285, 47),
    "fanotify_init": (300, 262), "fcntl": (72, 25), "fdatasync": (75, 83), "flock": (73, 32), "fork": (57, None),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fsopen": (430, 430), "fspick": (433, 433), "fstat": (5, 80),
    "fstatfs": (138, 44), "fsync": (74, 82), "ftruncate": (77, 46), "futex": (202, 98), "getcwd": (79, 17),
    "getdents64": (217, 61), "getegid": (108, 177), "geteuid": (107, 175), "getgid": (104, 176),
    "getgroups": (115, 158), "getpeername": (52, 205), "getpid": (39, 172), "getppid": (110, 173),
    "getrandom": (318, 278), "getresgid": (120, 150), "getresuid": (118, 148), "getrusage": (98, 165),
    "getsockname": (51, 204), "getsockopt": (55, 209), "gettid": (186, 178), "gettimeofday": (96, 169),
    "getuid": (102, 174), "inotify_init": (253, None), "inotify_init1": (294, 26), "io_setup": (206, 0),
    "io_uring_setup": (425, 425), "ioctl": (16, 29), "kcmp": (312, 272), "keyctl": (250, 219), "kill": (62, 129),
    "lseek": (8, 62), "lstat": (6, None), "madvise": (28, 233), "membarrier": (324, 283), "memfd_create": (319, 279),
    "memfd_secret": (447, 447), "mincore": (27, 232), "mmap": (9, 222), "mount": (165, 40), "mount_setattr": (442, 442),
    "move_mount": (429, 429), "mprotect": (10, 226), "mremap": (25, 216), "msgget": (68, 186), "msync": (26, 227),
    "munmap": (11, 215), "nanosleep": (35, 101), "newfstatat": (262, 79), "open": (2, None),
    "open_by_handle_at": (304, 265), "open_tree": (428, 428), "openat": (257, 56), "pause": (34, None),
    "perf_event_open": (298, 241), "pidfd_getfd": (438, 438), "pipe2": (293, 59), "pivot_root": (155, 41),
    "poll": (7, None), "ppoll": (271, 73), "prctl": (157, 167), "pread64": (17, 67), "preadv": (295, 69),
    "prlimit64": (302, 261), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pselect6": (270, 72),
    "ptrace": (101, 117), "pwrite64": (18, 68), "pwritev": (296, 70), "read": (0, 63), "readlink": (89, None),
    "readlinkat": (267, 78), "readv": (19, 65), "recvfrom": (45, 207), "recvmsg": (47, 212), "request_key": (249, 218),
    "restart_syscall": (219, 128), "rseq": (334, 293), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "rt_sigsuspend": (130, 133), "rt_sigtimedwait": (128, 137),
    "sched_getaffinity": (204, 123), "sched_yield": (24, 124), "seccomp": (317, 277), "select": (23, None),
    "semget": (64, 190), "sendmmsg": (307, 269), "sendmsg": (46, 211), "sendto": (44, 206),
    "set_robust_list": (273, 99), "set_tid_address": (218, 96), "setns": (308, 268), "setsockopt": (54, 208),
    "shmget": (29, 194), "shutdown": (48, 210), "sigaltstack": (131, 132), "signalfd4": (289, 74), "socket": (41, 198),
    "socketpair": (53, 199), "stat": (4, None), "statx": (332, 291), "sync_file_range": (277, 84), "sysinfo": (99, 179),
    "tgkill": (234, 131), "timer_create": (222, 107), "timer_delete": (226, 111), "timer_getoverrun": (225, 109),
    "timer_gettime": (224, 108), "timer_settime": (223, 110), "timerfd_create": (283, 85), "timerfd_gettime": (287, 87),
    "timerfd_settime": (286, 86), "umount2": (166, 39), "uname": (63, 160), "unshare": (272, 97),
    "userfaultfd": (323, 282), "vfork": (58, None), "write": (1, 64), "writev": (20, 66),
}
# fmt: on


def _calls(column: int) -> dict[str, int]:
    return {name: number for name, numbers in _CALLS.items() if (number := numbers[column]) is not None}


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
        syscalls=_calls(0),
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
        syscalls=_calls(1),
        tested=False,
    ),
}


def host_arch() -> Arch:
    """Return this machine's architecture. Raises HostError if it is not supported."""
    name = os.uname().machine
    try:
        return ARCHES[name]
    except KeyError:
        why = f"only {' and '.join(sorted(ARCHES))} are supported"
        raise HostError(f"cannot run on architecture {name}", why, "Use another host") from None
