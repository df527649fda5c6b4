"""What a machine boots: the kernel and its modules, from Debian's package, and the initramfs with init and agent.

The bzImage header is defined in the kernel's Documentation/arch/x86/boot.rst, protocol 2.08 and newer; that of an arm64
Image in Documentation/arch/arm64/booting.rst.

The initramfs is the second stage of an image. The image's own Python and compiler make it. They run in the built root,
under bubblewrap without network. Byte code of another Python would not load in the guest, and the host need not have a
compiler.
"""

import lzma
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from x07_sandbox.errors import ImageError
from x07_sandbox.host.arch import Arch
from x07_sandbox.images import commands, store
from x07_sandbox.images.store import GuestCode

UNPACKED_MAX = 3  # unpacked size / size of a root file system; measured: 2.2
_PAGE = 4096
MAX_FILE_BYTES = 0xFFFFFFFF  # the size field of a cpio archive has eight hexadecimal digits
_TRAILER = "TRAILER!!!"
GCC = ("gcc", "-std=gnu17", "-static", "-Os", "-s", "-Wall", "-Wl,--build-id=none")
COMPILE = (*GCC, "-o", "/opt/x07/init", "/x07/" + store.INIT)
PYTHON = ("python3", "-I", "-S")
FILTERS = (*PYTHON, "/x07/" + store.FILTERS, "/opt/x07/data")
PLACES = (*PYTHON, "/x07/" + store.PLACES, "/opt/x07/data/places.json")
PACK = (*PYTHON, "/x07/" + store.PACK, "/x07/agent", "/opt/x07/data", "/opt/x07/agent.zip")
FILTER_SUFFIX = ".bpf"
SIZE_BYTES = 4  # of the unpacked size, which follows the zstd stream
MAX_KERNEL_BYTES = 512 * 1024 * 1024
_ARM64, _X86 = slice(56, 60), slice(0x202, 0x206)  # where the magic numbers are
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


def make_initrd(
    work: Path,
    root_file: Path,
    modules: Mapping[str, Path],
    arch: Arch,
    code: GuestCode,
    progress: Callable[[str], None],
) -> tuple[bytes, dict[str, bytes]]:
    """Return the initramfs with *code*, and its seccomp filters by name.

    work: an empty folder. root_file: the image's root file system. modules: see `initramfs`. arch: the image's
    architecture, whose programs this host must be able to execute. Raises SandboxError.
    """
    commands.check_space(work.parent, UNPACKED_MAX * root_file.stat().st_size)
    progress("unpacking the image's root file system, which contains the compiler")
    root = commands.unpack_root(work, root_file)
    source, target = work / "source", work / "target"
    code.write(source)
    (target / "data").mkdir(parents=True)
    progress("compiling the guest agent")
    for command in (COMPILE, FILTERS, PLACES, PACK):
        commands.run(bwrap_argv(root, source, target, command), cwd=work, timeout_s=120 * commands.slower(arch))
    init, agent = (target / "init").read_bytes(), (target / "agent.zip").read_bytes()
    filters = {path.name: path.read_bytes() for path in sorted((target / "data").glob(f"*{FILTER_SUFFIX}"))}
    commands.remove_tree(root)
    return initramfs(init, agent, modules, arch), filters


def bwrap_argv(root: Path, source: Path, target: Path, command: tuple[str, ...]) -> list[str]:
    """Return the command line that runs *command* in *root*, with *source* at /x07 and *target* at /opt/x07."""
    argv = [commands.tool("bwrap"), "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    argv.append("--clearenv")
    for name, value in (("PATH", "/usr/bin:/bin"), ("LC_ALL", "C.UTF-8"), ("SOURCE_DATE_EPOCH", str(commands.EPOCH))):
        argv += ["--setenv", name, value]
    argv += ["--ro-bind", str(root), "/", "--dev", "/dev", "--tmpfs", "/tmp"]  # noqa: S108 - inside the built root
    argv += ["--ro-bind", str(source), "/x07", "--bind", str(target), "/opt/x07"]
    return [*argv, "--chdir", "/", "--", *command]


def initramfs(init: bytes, agent: bytes, modules: Mapping[str, Path], arch: Arch) -> bytes:
    """Return the initramfs. modules: files of kernel modules, by name below `modules/`, numbered in loading order."""
    entries = [Entry("init", stat.S_IFREG | 0o500, init), Entry("agent.zip", stat.S_IFREG | 0o400, agent)]
    entries += [Entry(name, stat.S_IFDIR | 0o755) for name in ("dev", "modules", "modules/net")]
    entries += [Entry(f"modules/{name}", stat.S_IFREG | 0o444, path.read_bytes()) for name, path in modules.items()]
    return padded(packed(entries), arch)


def padded(archive: bytes, arch: Arch) -> bytes:
    """Return an initramfs that ends where QEMU's machine of this architecture needs it to.

    The kernel ignores zeros behind the archive.
    """
    tail_bytes = arch.initrd_tail_bytes
    return archive if tail_bytes is None else archive + bytes((tail_bytes - len(archive)) % _PAGE)


class Entry(NamedTuple):
    """A file or folder of an initramfs. mode includes the type (stat.S_IFREG or stat.S_IFDIR)."""

    name: str
    mode: int
    data: bytes = b""


def packed(entries: Sequence[Entry]) -> bytes:
    """Return a newc archive (cpio(5)), with owner root, inode numbers from 1 and no times.

    Raises ValueError for an empty, absolute or duplicate name, and for a file over MAX_FILE_BYTES.
    """
    out = bytearray()
    seen: set[str] = set()
    for inode, entry in enumerate([*entries, Entry(_TRAILER, 0)], start=1):
        if not entry.name or entry.name.startswith("/") or "\0" in entry.name or entry.name in seen:
            raise ValueError(f"bad name in archive: {entry.name!r}")
        seen.add(entry.name)
        out += _header(inode, entry)
        out += entry.name.encode() + b"\0"
        out += bytes(-len(out) % 4)
        out += entry.data
        out += bytes(-len(out) % 4)
    return bytes(out)


def _header(inode: int, entry: Entry) -> bytes:
    size = check_size(entry.name, len(entry.data))
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    # inode mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
    fields = (inode, entry.mode, 0, 0, links, 0, size, 0, 0, 0, 0, len(entry.name.encode()) + 1, 0)
    return b"070701" + b"".join(b"%08X" % field for field in fields)


def check_size(name: str, size: int) -> int:
    """Return *size*. Raises ValueError if the format cannot store a file of that size."""
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{name} has {size} bytes, but a cpio entry holds at most {MAX_FILE_BYTES}")
    return size


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A kernel: its release, the ELF image, and (name, content) of modules in loading order."""

    release: str
    vmlinux: bytes
    boot: tuple[tuple[str, bytes], ...]
    net: tuple[tuple[str, bytes], ...]


def vmlinux(image: bytes, unzstd: Callable[[bytes], bytes]) -> bytes:
    """Return the ELF kernel inside a bzImage, or an arm64 Image as it is. Raises ImageError."""
    if image[_ARM64] == b"ARMd":
        return image
    if image[4:8] == b"zimg":
        raise _bad("it is an EFI zboot image, not a raw Image (arm64)")
    if image[_X86] != b"HdrS":
        raise _bad("it is neither a bzImage nor a raw Image (arm64)")
    offset, length = (int.from_bytes(image[at : at + 4], "little") for at in (0x248, 0x24C))
    start = ((image[0x1F1] or 4) + 1) * 512 + offset  # behind the setup sectors
    elf = unzstd(image[start : start + length - SIZE_BYTES])
    if elf[:4] != b"\x7fELF":
        raise _bad("its payload is not an ELF file")
    return elf


def bootable_release(image: bytes, arch: str) -> str:
    """Return the release of a bzImage (x86_64) or a raw Image (aarch64), or "" if *image* is something else."""
    found = None
    if arch == "aarch64" and image[_ARM64] == b"ARMd":
        found = re.search(rb"Linux version ([!-~]{1,200}) ", image)
    elif arch == "x86_64" and image[_X86] == b"HdrS":
        version = 0x200 + int.from_bytes(image[0x20E:0x210], "little")
        found = re.match(rb"([!-~]{1,200}) ", image[version : version + 256])
    return found[1].decode() if found else ""


def needed_modules(module: bytes) -> list[str]:
    """Return the names of the modules on which a module depends, from its .modinfo section. Raises ImageError."""
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    if found is None:
        raise _bad_module("it does not say on which modules it depends")
    return [module_name(name) for name in found[1].decode(errors="replace").split(",") if name]


def load_order(wanted: Iterable[str], needs: Callable[[str], Iterable[str] | None]) -> list[str]:
    """Return *wanted* and their dependencies, each after its own dependencies, in a fixed order.

    Names have underscores, as the kernel shows them. needs: returns the dependencies of a module, or None for a module
    to leave out.
    """
    order: list[str] = []

    def visit(name: str) -> None:
        if name not in order and (needed := needs(name)) is not None:
            for other in sorted(needed):
                visit(other)
            order.append(name)

    for name in wanted:
        visit(name)
    return order


def read_package(root: Path, unzstd: Callable[[bytes], bytes]) -> Kernel:
    """Read the kernel from the unpacked file tree of a linux-image package. Raises ImageError."""
    images = list(root.glob("boot/vmlinuz-*"))
    if len(images) != 1:
        raise _bad(f"it contains {len(images)} kernels")
    boot, net = read_modules(root, BOOT_MODULES, NET_MODULES)
    return Kernel(
        release=images[0].name.removeprefix("vmlinuz-"),
        vmlinux=vmlinux(images[0].read_bytes(), unzstd),
        boot=boot,
        net=net,
    )


def read_modules(root: Path, *groups: Iterable[str]) -> Iterator[tuple[tuple[str, bytes], ...]]:
    """Yield, for each group of modules, names and contents of what it needs beyond earlier groups, in loading order.

    root: see `read_package`. Raises ImageError.
    """
    files = {module_name(path.name): path for path in root.rglob("*.ko*") if re.search(r"\.ko(\.xz)?$", path.name)}
    built_in = {module_name(line) for path in root.rglob("modules.builtin") for line in path.read_text().splitlines()}
    loaded: dict[str, bytes] = {}
    earlier: set[str] = set()

    def needs(name: str) -> list[str] | None:
        if name not in files:
            if name in built_in:
                return None
            raise _bad_module(f"there is no module {name}")
        data = files[name].read_bytes()
        # The package has no modules.dep (depmod makes it after installation), so read the modules themselves.
        loaded[name] = _unxz(data) if files[name].suffix == ".xz" else data
        return needed_modules(loaded[name])

    for group in groups:
        names = [name for name in load_order(group, needs) if name not in earlier]
        yield tuple((name, loaded[name]) for name in names)
        earlier.update(names)


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
