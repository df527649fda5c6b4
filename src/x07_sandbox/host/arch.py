"""Everything that depends on the machine's architecture. As a host, only x86_64 has been tested."""

import os

import msgspec

from x07_sandbox.errors import HostError, UsageError


class Arch(msgspec.Struct, frozen=True, kw_only=True):
    """Names and settings of one architecture."""

    name: str  # uname -m
    deb: str  # Debian's name
    qemu_binary: str
    qemu_package: str
    machine: str
    # QEMU's CPU model. QEMU emulates `rep movsb` byte by byte. Without erms and fsrm, the guest's kernel copies words,
    # which is three to five times faster (docs/explanation/performance.md). On ARM, the standard algorithm that signs
    # pointers at each function call takes a third of the time of Python code (measured).
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


# System calls of the jail's scripts in perl. A test compares the numbers with libseccomp's.
_CALLS = {  # x86_64, aarch64
    "capset": (126, 91),
    "close": (3, 57),
    "close_range": (436, 436),
    "dup3": (292, 24),
    "execve": (59, 221),
    "mmap": (9, 222),
    "mount": (165, 40),
    "prctl": (157, 167),
    "prlimit64": (302, 261),
    "ptrace": (101, 117),
    "read": (0, 63),
    "rt_sigprocmask": (14, 135),
    "rt_sigtimedwait": (128, 137),
    "seccomp": (317, 277),
    "sendmsg": (46, 211),
    "setsid": (112, 157),
    "umount2": (166, 39),
    "unshare": (272, 97),
}


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
        syscalls={name: numbers[0] for name, numbers in _CALLS.items()},
        tested=True,
    ),
    "aarch64": Arch(
        name="aarch64",
        deb="arm64",
        qemu_binary="/usr/bin/qemu-system-aarch64",
        qemu_package="qemu-system-arm",
        machine="virt",
        emulated_cpu="max,pauth-impdef=on",
        firmware=(),
        firmware_packages=(),
        initrd_tail_bytes=None,
        kernel_package="linux-image-cloud-arm64",
        multiarch="aarch64-linux-gnu",
        loader="/lib/ld-linux-aarch64.so.1",
        audit=0xC00000B7,
        elf_machine=183,
        syscalls={name: numbers[1] for name, numbers in _CALLS.items()},
        tested=False,
    ),
}


def is_foreign(arch: Arch) -> bool:
    """Return whether this host's processor cannot run a kernel of this architecture."""
    return arch.name != os.uname().machine


def arch_named(name: str) -> Arch:
    """Return the architecture with the given name, as uname or Debian call it. Raises UsageError."""
    for arch in ARCHES.values():
        if name in {arch.name, arch.deb}:
            return arch
    names = " and ".join(f"{arch.deb} ({arch.name})" for arch in ARCHES.values())
    raise UsageError(f"cannot use the architecture {name[:80]!r}", "x07 does not support it", f"Use one of {names}")


def host_arch() -> Arch:
    """Return this machine's architecture. Raises HostError if it is not supported."""
    name = os.uname().machine
    try:
        return ARCHES[name]
    except KeyError:
        why = f"only {' and '.join(sorted(ARCHES))} are supported"
        raise HostError(f"cannot run on architecture {name}", why, "Use another host") from None
