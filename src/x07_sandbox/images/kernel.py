"""Extracting Debian's kernel package: the ELF kernel inside bzImage, and the modules in loading order.

The bzImage header is defined in the kernel's Documentation/arch/x86/boot.rst, protocol 2.08 and newer.
"""

from __future__ import annotations

import lzma
import re
import struct
import tarfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

from x07_sandbox.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

HEADER_BYTES = 0x250
SIZE_BYTES = 4
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
MAX_KERNEL_BYTES = 512 * 1024 * 1024
MAX_MODULE_BYTES = 64 * 1024 * 1024
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


def payload(image: bytes) -> tuple[bytes, int]:
    """Return the zstd stream of a bzImage, and its unpacked size. Raises ImageError."""
    if image[4:8] == b"zimg":
        why = "it is an EFI zboot image (aarch64), which this version does not support"
        raise ImageError("cannot use the kernel package", why, "Build the image on x86-64")
    if len(image) < HEADER_BYTES or image[0x202:0x206] != b"HdrS":
        raise _bad("it is not a bzImage")
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    body = image[start : start + length]
    if length < len(ZSTD_MAGIC) + SIZE_BYTES or len(body) != length:
        raise _bad("its header points outside the file")
    if body[:4] != ZSTD_MAGIC:
        raise _bad("its payload is not zstd")
    # The unpacked size follows the stream.
    (size,) = struct.unpack("<I", body[-SIZE_BYTES:])
    if size > MAX_KERNEL_BYTES:
        raise _bad(f"its unpacked size of {size} bytes is too large")
    return body[:-SIZE_BYTES], size


def vmlinux(image: bytes, unzstd: Callable[[bytes], bytes]) -> bytes:
    """Return the ELF kernel inside a bzImage. Raises ImageError."""
    packed, size = payload(image)
    elf = unzstd(packed)
    if elf[:4] != b"\x7fELF" or len(elf) != size:
        raise _bad("its payload is not an ELF file of the expected size")
    return elf


def modinfo(module: bytes) -> dict[str, str]:
    """Return the .modinfo section of a module: the last value of each key. Raises ImageError."""
    try:
        if module[:6] != b"\x7fELF\x02\x01":
            raise _bad_module("it is not a little-endian 64-bit ELF file")
        (table,) = struct.unpack_from("<Q", module, 0x28)
        entry_size, count, names_index = struct.unpack_from("<HHH", module, 0x3A)
        sections = [struct.unpack_from("<IIQQQQ", module, table + i * entry_size) for i in range(count)]
        names_at = sections[names_index][4]
        for name, _kind, _flags, _address, offset, size in sections:
            if module[names_at + name : names_at + name + 9] == b".modinfo\0":
                fields = (field.partition(b"=") for field in module[offset : offset + size].split(b"\0") if field)
                return {key.decode(errors="replace"): value.decode(errors="replace") for key, _, value in fields}
    except (struct.error, IndexError) as exc:
        raise _bad_module("its section table is damaged") from exc
    raise _bad_module("it has no .modinfo section")


def load_order(
    wanted: Iterable[str], depends: Mapping[str, Iterable[str]], built_in: frozenset[str] = frozenset()
) -> list[str]:
    """Return *wanted* and their dependencies, each after its own dependencies, in a fixed order.

    Names have underscores, as the kernel shows them. Raises ImageError for an unknown name and for a cycle.
    """
    order: list[str] = []

    def visit(name: str, dependents: tuple[str, ...] = ()) -> None:
        if name in order or (name in built_in and name not in depends):
            return
        if name in dependents:
            raise _bad_module(f"modules depend on each other: {' '.join([*dependents, name])}")
        if name not in depends:
            raise _bad_module(f"there is no module {name}")
        for needed in sorted(depends[name]):
            visit(needed, (*dependents, name))
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
            depends[name] = [
                module_name(needed) for needed in modinfo(loaded[name]).get("depends", "").split(",") if needed
            ]
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
    unpacker = lzma.LZMADecompressor(memlimit=256 * 1024 * 1024)
    try:
        module = unpacker.decompress(data, max_length=MAX_MODULE_BYTES)
    except lzma.LZMAError as exc:
        raise _bad_module(f"it cannot be unpacked ({exc})") from exc
    if not unpacker.eof:
        raise _bad_module("it is truncated or too large")
    return module


def _bad(why: str, what: str = "the kernel package") -> ImageError:
    return ImageError(f"cannot use {what}", why, "Build the image on a Debian release that x07 supports (13)")


def _bad_module(why: str) -> ImageError:
    return _bad(why, "a kernel module in the package")
