"""The one table of what depends on the machine's architecture. Only x86_64 has been run."""

from __future__ import annotations

import os

import msgspec

from x07_sandbox.errors import HostError


class Arch(msgspec.Struct, frozen=True, kw_only=True):
    """Names and switches of one architecture.

    firmware: paths below /usr/share that the machine type reads at start, which firmware_packages bring.
    initrd_tail_bytes: how much of its last page an initramfs has to fill (backends/qemu/machine); None for any.
    """

    name: str  # as the kernel says it: uname -m
    deb: str  # Debian's name
    qemu_binary: str
    qemu_package: str
    machine: str
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


# Numbers of the system calls that the jail's filter and its supervisor name, and the guest (a test compares them with
# libseccomp's, another the guest's own with these).
# fmt: off
_X86_64_CALLS = {
    "add_key": 248, "bpf": 321, "capset": 126, "chroot": 161, "clone": 56, "clone3": 435, "close_range": 436,
    "execve": 59, "fanotify_init": 300, "fcntl": 72, "flock": 73, "fork": 57, "fsconfig": 431, "fsmount": 432,
    "fsopen": 430, "fspick": 433, "inotify_init": 253, "inotify_init1": 294, "io_setup": 206, "io_uring_setup": 425,
    "kcmp": 312, "keyctl": 250, "memfd_create": 319, "memfd_secret": 447, "mount": 165, "mount_setattr": 442,
    "move_mount": 429, "msgget": 68, "open_by_handle_at": 304, "open_tree": 428, "perf_event_open": 298,
    "pidfd_getfd": 438, "pivot_root": 155, "prctl": 157, "process_vm_readv": 310, "process_vm_writev": 311,
    "ptrace": 101, "request_key": 249, "rt_sigprocmask": 14, "rt_sigtimedwait": 128, "seccomp": 317, "semget": 64,
    "setns": 308, "shmget": 29, "socket": 41, "umount2": 166, "unshare": 272, "userfaultfd": 323, "vfork": 58,
}
_AARCH64_CALLS = {
    "add_key": 217, "bpf": 280, "capset": 91, "chroot": 51, "clone": 220, "clone3": 435, "close_range": 436,
    "execve": 221, "fanotify_init": 262, "fcntl": 25, "flock": 32, "fsconfig": 431, "fsmount": 432, "fsopen": 430,
    "fspick": 433, "inotify_init1": 26, "io_setup": 0, "io_uring_setup": 425, "kcmp": 272, "keyctl": 219,
    "memfd_create": 279, "memfd_secret": 447, "mount": 40, "mount_setattr": 442, "move_mount": 429, "msgget": 186,
    "open_by_handle_at": 265, "open_tree": 428, "perf_event_open": 241, "pidfd_getfd": 438, "pivot_root": 41,
    "prctl": 167, "process_vm_readv": 270, "process_vm_writev": 271, "ptrace": 117, "request_key": 218,
    "rt_sigprocmask": 135, "rt_sigtimedwait": 137, "seccomp": 277, "semget": 190, "setns": 268, "shmget": 194,
    "socket": 198, "umount2": 39, "unshare": 97, "userfaultfd": 282,
}
# fmt: on

ARCHES: dict[str, Arch] = {
    "x86_64": Arch(
        name="x86_64",
        deb="amd64",
        qemu_binary="/usr/bin/qemu-system-x86_64",
        qemu_package="qemu-system-x86",
        machine="microvm",
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
