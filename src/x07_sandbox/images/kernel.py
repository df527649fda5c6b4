"""Extracting Debian's kernel package: the ELF kernel inside bzImage, and the modules in loading order.

The bzImage header is defined in the kernel's Documentation/arch/x86/boot.rst, protocol 2.08 and newer.
"""

from __future__ import annotations

import lzma
import re
import tarfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

from x07_sandbox.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

SIZE_BYTES = 4  # of the unpacked size, which follows the zstd stream
MAX_KERNEL_BYTES = 512 * 1024 * 1024
# For init to reach the root file system, and for the mounts of every job.
# fmt: off
BOOT_MODULES = (
    "libcrc32c", "virtio_mmio", "virtio_blk", "virtio_pci", "virtio_rng", "erofs", "overlay", "ext4", "virtio_console",
)
# For the relay's rules in jobs with a network policy.
NET_MODULES = (
    "nfnetlink", "nfnetlink_queue", "nf_tables", "nft_queue", "nft_tproxy", "nft_socket", "nf_tproxy_ipv4",
    "nf_tproxy_ipv6", "nf_socket_ipv4", "nf_socket_ipv6", "nf_defrag_ipv4", "nf_defrag_ipv6", "nf_conntrack", "nft_ct",
    "nft_reject", "nf_reject_ipv4", "nf_reject_ipv6", "nft_reject_ipv4", "nft_reject_ipv6", "nft_reject_inet",
)
# fmt: on


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A kernel: its release, the ELF image, and (name, content) of modules in loading order."""

    release: str
    vmlinux: bytes
    boot: tuple[tuple[str, bytes], ...]
    net: tuple[tuple[str, bytes], ...]


def vmlinux(image: bytes, unzstd: Callable[[bytes], bytes]) -> bytes:
    """Return the ELF kernel inside a bzImage. Raises ImageError."""
    if image[4:8] == b"zimg":
        why = "it is an EFI zboot image (aarch64), which this version does not support"
        raise ImageError("cannot use the kernel package", why, "Build the image on x86-64")
    if image[0x202:0x206] != b"HdrS":
        raise _bad("it is not a bzImage")
    offset, length = (int.from_bytes(image[at : at + 4], "little") for at in (0x248, 0x24C))
    start = ((image[0x1F1] or 4) + 1) * 512 + offset  # behind the setup sectors
    elf = unzstd(image[start : start + length - SIZE_BYTES])
    if elf[:4] != b"\x7fELF":
        raise _bad("its payload is not an ELF file")
    return elf


def needed_modules(module: bytes) -> list[str]:
    """Return the names of the modules on which a module depends, from its .modinfo section. Raises ImageError."""
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    if found is None:
        raise _bad_module("it does not say on which modules it depends")
    return [module_name(name) for name in found[1].decode(errors="replace").split(",") if name]


def load_order(
    wanted: Iterable[str], depends: Mapping[str, Iterable[str]], built_in: frozenset[str] = frozenset()
) -> list[str]:
    """Return *wanted* and their dependencies, each after its own dependencies, in a fixed order.

    Names have underscores, as the kernel shows them. Raises ImageError for an unknown name.
    """
    order: list[str] = []

    def visit(name: str) -> None:
        if name in order or (name in built_in and name not in depends):
            return
        if name not in depends:
            raise _bad_module(f"there is no module {name}")
        for needed in sorted(depends[name]):
            visit(needed)
        order.append(name)

    for name in wanted:
        visit(name)
    return order


def read_package(tar_path: Path, unzstd: Callable[[bytes], bytes]) -> Kernel:
    """Read the kernel from the file tree of a linux-image package, a tar file. Raises ImageError."""
    with tarfile.open(tar_path, "r:") as tar:
        members = {member.name.removeprefix("./"): member for member in tar if member.isfile()}

        def read(name: str) -> bytes:
            file = tar.extractfile(members[name])
            assert file is not None  # noqa: S101 - only regular files are in members
            return file.read(MAX_KERNEL_BYTES)

        images = [name for name in members if name.startswith("boot/vmlinuz-")]
        if len(images) != 1:
            raise _bad(f"it contains {len(images)} kernels")
        release = images[0].removeprefix("boot/vmlinuz-")
        files = {
            module_name(name): name
            for name in members
            if f"lib/modules/{release}/" in name and re.search(r"\.ko(\.xz)?$", name)
        }
        built_in_files = [name for name in members if name.endswith(f"lib/modules/{release}/modules.builtin")]
        built_in = frozenset(module_name(line) for name in built_in_files for line in read(name).decode().splitlines())
        loaded: dict[str, bytes] = {}
        depends: dict[str, list[str]] = {}
        pending = [*BOOT_MODULES, *NET_MODULES]
        # The package has no modules.dep (depmod makes it after installation), so read the modules themselves.
        while pending:
            name = pending.pop()
            if name in loaded or name not in files:
                continue
            loaded[name] = _unxz(read(files[name])) if files[name].endswith(".xz") else read(files[name])
            depends[name] = needed_modules(loaded[name])
            pending += depends[name]
        boot = load_order(BOOT_MODULES, depends, built_in)
        net = [name for name in load_order(NET_MODULES, depends, built_in) if name not in boot]
        return Kernel(
            release=release,
            vmlinux=vmlinux(read(images[0]), unzstd),
            boot=tuple((name, loaded[name]) for name in boot),
            net=tuple((name, loaded[name]) for name in net),
        )


def module_name(path: str) -> str:
    """Return the kernel's name for a module file."""
    return re.sub(r"\.ko(\.xz)?$", "", path.rpartition("/")[2]).replace("-", "_")


def _unxz(data: bytes) -> bytes:
    try:
        return lzma.decompress(data)
    except lzma.LZMAError as exc:
        raise _bad_module(f"it cannot be unpacked ({exc})") from exc


def _bad(why: str, what: str = "the kernel package") -> ImageError:
    return ImageError(f"cannot use {what}", why, "Build the image on a Debian release that x07 supports (13)")


def _bad_module(why: str) -> ImageError:
    return _bad(why, "a kernel module in the package")
