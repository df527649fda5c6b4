"""The second stage of an image: the initramfs with init, modules and agent.

The image's own Python and compiler make the initramfs. They run in the built root, under bubblewrap without network.
Byte code of another Python would not load in the guest, and the host need not have a compiler.
"""

from collections.abc import Callable
from pathlib import Path

from x07_sandbox.host.arch import Arch
from x07_sandbox.images import commands, cpio, foreign, guestcode
from x07_sandbox.images.base import Base, check_space, remove_tree, unpack_root
from x07_sandbox.images.guestcode import GuestCode

UNPACKED_MAX = 3  # unpacked size / size of a root file system; measured: 2.2
_PAGE = 4096
GCC = ("gcc", "-std=gnu17", "-static", "-Os", "-s", "-Wall", "-Wl,--build-id=none")
COMPILE = (*GCC, "-o", "/opt/x07/init", "/x07/" + guestcode.INIT)
PYTHON = ("python3", "-I", "-S")
FILTERS = (*PYTHON, "/x07/" + guestcode.FILTERS, "/opt/x07/data")
PLACES = (*PYTHON, "/x07/" + guestcode.PLACES, "/opt/x07/data/places.json")
PACK = (*PYTHON, "/x07/" + guestcode.PACK, "/x07/agent", "/opt/x07/data", "/opt/x07/agent.zip")
FILTER_SUFFIX = ".bpf"


def make_initrd(
    work: Path, base_folder: Path, base: Base, arch: Arch, code: GuestCode, progress: Callable[[str], None]
) -> tuple[bytes, dict[str, bytes]]:
    """Return the initramfs with *code*, and its seccomp filters by name.

    work: an empty folder. arch: the image's architecture, whose programs this host must be able to execute. Raises
    SandboxError.
    """
    check_space(work.parent, UNPACKED_MAX * base.root.bytes)
    progress("unpacking the image's root file system, which contains the compiler")
    root = unpack_root(work, base_folder / base.root.file)
    source, target = work / "source", work / "target"
    code.write(source)
    (target / "data").mkdir(parents=True)
    progress("compiling the guest agent")
    for command in (COMPILE, FILTERS, PLACES, PACK):
        commands.run(bwrap_argv(root, source, target, command), cwd=work, timeout_s=120 * foreign.slower(arch))
    init, agent = (target / "init").read_bytes(), (target / "agent.zip").read_bytes()
    filters = {path.name: path.read_bytes() for path in sorted((target / "data").glob(f"*{FILTER_SUFFIX}"))}
    remove_tree(root)
    return pack(init, agent, base_folder, base, arch), filters


def bwrap_argv(root: Path, source: Path, target: Path, command: tuple[str, ...]) -> list[str]:
    """Return the command line that runs *command* in *root*, with *source* at /x07 and *target* at /opt/x07."""
    argv = [commands.tool("bwrap"), "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    argv.append("--clearenv")
    for name, value in (("PATH", "/usr/bin:/bin"), ("LC_ALL", "C.UTF-8"), ("SOURCE_DATE_EPOCH", str(commands.EPOCH))):
        argv += ["--setenv", name, value]
    argv += ["--ro-bind", str(root), "/", "--dev", "/dev", "--tmpfs", "/tmp"]  # noqa: S108 - inside the built root
    argv += ["--ro-bind", str(source), "/x07", "--bind", str(target), "/opt/x07"]
    return [*argv, "--chdir", "/", "--", *command]


def pack(init: bytes, agent: bytes, base_folder: Path, base: Base, arch: Arch) -> bytes:
    """Return the initramfs. The file names of kernel modules are numbered in loading order."""
    entries = [
        cpio.file("init", init, 0o500),
        cpio.file("agent.zip", agent, 0o400),
        cpio.folder("dev"),
        cpio.folder("modules"),
        cpio.folder("modules/net"),
    ]
    entries += [cpio.file(f"modules/{part.file}", (base_folder / part.file).read_bytes()) for part in base.boot]
    entries += [
        cpio.file(f"modules/net/{part.file.removeprefix('net-')}", (base_folder / part.file).read_bytes())
        for part in base.net
    ]
    archive, tail_bytes = cpio.pack(entries), arch.initrd_tail_bytes
    # The kernel ignores zeros behind the archive.
    return archive if tail_bytes is None else archive + b"\0" * ((tail_bytes - len(archive)) % _PAGE)
