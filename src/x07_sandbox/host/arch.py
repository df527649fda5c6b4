"""The one table of what depends on the machine's architecture.

Only x86_64 has been run; the aarch64 row holds what its packages are called and is marked untested.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

from x07_sandbox.errors import HostError


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """Names and switches of one architecture.

    firmware: paths below /usr/share that the machine type reads at start.
    console: kernel console argument that leads nowhere by default, so that no guest text costs time.
    """

    name: str  # as the kernel says it: uname -m
    deb: str  # Debian's name
    qemu_binary: str
    qemu_package: str
    machine: str
    firmware: tuple[str, ...]
    kernel_package: str
    kernel_format: str  # "bzImage" or "zboot"
    multiarch: str
    loader: str  # the dynamic loader's path
    tested: bool


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
        kernel_package="linux-image-cloud-amd64",
        kernel_format="bzImage",
        multiarch="x86_64-linux-gnu",
        loader="/lib64/ld-linux-x86-64.so.2",
        tested=True,
    ),
    "aarch64": Arch(
        name="aarch64",
        deb="arm64",
        qemu_binary="/usr/bin/qemu-system-aarch64",
        qemu_package="qemu-system-arm",
        machine="virt",
        firmware=(),
        kernel_package="linux-image-cloud-arm64",
        kernel_format="zboot",
        multiarch="aarch64-linux-gnu",
        loader="/lib/ld-linux-aarch64.so.1",
        tested=False,
    ),
}


def host_arch() -> Arch:
    """The row of this machine. Raises HostError where there is none."""
    name = platform.machine()
    try:
        return ARCHES[name]
    except KeyError:
        raise HostError(
            f"no virtual machine for architecture {name}",
            f"only {', '.join(sorted(ARCHES))} have a row in host/arch.py",
            "Run x07 on one of these machines",
        ) from None
