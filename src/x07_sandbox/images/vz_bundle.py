"""Guest bundles: folders with what Apple's Virtualization framework starts a machine from (docs/backends/vz.md).

A bundle is made from an image of the store. Only the kernel may have to come from elsewhere: images for x86_64 contain
the ELF kernel, which QEMU starts, but the framework needs the bzImage around it.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

import msgspec

from x07_sandbox.channel.messages import PROTOCOL
from x07_sandbox.errors import ImageError, UsageError
from x07_sandbox.host.paths import read_bounded
from x07_sandbox.images import base, kernel, verify
from x07_sandbox.images.manifest import Part, ScratchDisk
from x07_sandbox.images.store import Image

SCHEMA: Final = "x07.sandbox.vz-bundle@0.1.0"
SECTOR: Final = 512  # the framework refuses disks of other sizes
# The kernel's words under QEMU, with the console of a virtual machine of the framework. The timer is the host's own.
COMMAND_LINE: Final = (
    "console=hvc0 quiet panic=-1 psi=0 noautogroup nowatchdog lsm=lockdown,landlock,yama cryptomgr.notests "
    "initcall_blacklist=jent_mod_init x07.timer=any"
)


class Bundle(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """The content of a bundle's manifest.json.

    arch: of the Mac, as `uname -m` says on Linux. image: digest of the image. agent_protocol: version of the channel.
    rootfs, program: disks. scratch, scratch_disk: the recipe of an empty scratch disk (images/scratch.py).
    """

    schema_version: str
    arch: str
    image: str
    kernel_release: str
    agent_protocol: int
    kernel: Part
    initrd: Part
    rootfs: Part
    cmdline: Part
    scratch: Part
    scratch_disk: ScratchDisk
    program: Part | None = None


def make_bundle(image: Image, out: Path, kernel_file: Path | None = None) -> Bundle:
    """Make the bundle *out* of *image*, and return its manifest. Raises SandboxError, OSError.

    kernel_file: the kernel to start instead of the image's.
    """
    if os.path.lexists(out):
        raise UsageError(f"cannot write the guest bundle {out}", "it exists", "Remove it, or name another folder")
    made = image.manifest
    with verify.open_image(image) as opened, tempfile.TemporaryDirectory(prefix=".x07-", dir=out.parent) as temporary:
        folder = Path(temporary, "bundle")
        folder.mkdir(mode=verify.FOLDER_MODE)

        def copied(part: str, name: str) -> Part:
            with open(opened.fds[part], "rb", closefd=False) as source, (folder / name).open("xb") as target:
                shutil.copyfileobj(source, target, verify.CHUNK_BYTES)
            written = base.part_of(folder, name)
            if part in {"root", "program"} and written.bytes % SECTOR:
                raise ImageError(f"cannot use the disk {name}", f"its size is no multiple of {SECTOR}", verify.FIX)
            return written

        if kernel_file is None:
            data = os.pread(opened.fds["kernel"], kernel.MAX_KERNEL_BYTES, 0)
        else:
            data = read_bounded(kernel_file, "kernel", kernel.MAX_KERNEL_BYTES)
        check_kernel(data, made.arch, made.kernel_release)
        bundle = Bundle(
            schema_version=SCHEMA,
            arch=made.arch,
            image=made.digest,
            kernel_release=made.kernel_release,
            agent_protocol=PROTOCOL,
            kernel=base.put(folder, "kernel", data),
            initrd=copied("initrd", "initrd"),
            rootfs=copied("root", "rootfs"),
            cmdline=base.put(folder, "cmdline", COMMAND_LINE.encode()),
            scratch=copied("scratch", "scratch.head"),
            scratch_disk=made.scratch_disk,
            program=copied("program", "program") if made.parts.program else None,
        )
        base.put(folder, "manifest.json", msgspec.json.format(msgspec.json.encode(bundle), indent=2) + b"\n")
        folder.rename(out)
    return bundle


def check_kernel(data: bytes, arch: str, release: str) -> None:
    """Raise ImageError unless the framework starts *data*, and it is the kernel for the image's modules."""
    found = kernel.bootable_release(data, arch)
    if found != release:
        why = f"its release is {found}" if found else f"it is not {'a raw Image' if arch == 'aarch64' else 'a bzImage'}"
        fix = f"Add --kernel FILE, with boot/vmlinuz-{release} of Debian's package linux-image-{release}"
        raise ImageError(f"a Mac cannot start this kernel with modules of {release}", why, fix)
