"""Guest bundles: folders with what Apple's Virtualization framework starts a machine from (docs/backends/vz.md).

A bundle is made from an image of the store. Only the kernel may have to come from elsewhere: images for x86_64 contain
the ELF kernel, which QEMU starts, but the framework needs the bzImage around it.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from x07_sandbox.channel.messages import PROTOCOL
from x07_sandbox.errors import HostError, ImageError, UsageError
from x07_sandbox.host.documents import prepared
from x07_sandbox.host.paths import private_dir, read_bounded
from x07_sandbox.images import base, boot, store, verify
from x07_sandbox.images.store import Image, Manifest, Part, ScratchDisk, installed_code

SCHEMA: Final = "x07.sandbox.vz-bundle@0.1.0"
SECTOR: Final = 512  # the framework refuses disks of other sizes
# The kernel's words under QEMU, with the console of a virtual machine of the framework. The timer is the host's own.
COMMAND_LINE: Final = (
    "console=hvc0 quiet panic=-1 psi=0 noautogroup nowatchdog lsm=lockdown,landlock,yama cryptomgr.notests "
    "initcall_blacklist=jent_mod_init x07.timer=any"
)
FIX: Final = "Build the guest bundle again, and set X07_VM_VZ_GUEST_BUNDLE to it"
_CMDLINE_MAX: Final = 2048  # the kernel's own limit


class Bundle(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """The content of a bundle's manifest.json.

    arch: of the Mac, as `uname -m` says on Linux. image: digest of the image. agent_protocol: version of the channel.
    image_manifest: the image's own manifest. rootfs, program: disks. scratch, scratch_disk: the recipe of an empty
    scratch disk (images/verify.py).
    """

    schema_version: str
    arch: str
    image: str
    kernel_release: str
    agent_protocol: int
    image_manifest: Part
    kernel: Part
    initrd: Part
    rootfs: Part
    cmdline: Part
    scratch: Part
    scratch_disk: ScratchDisk
    program: Part | None = None

    def parts(self) -> dict[str, Part]:
        """Return all files by name, in a fixed order."""
        return {name: part for name in self.__struct_fields__ if isinstance(part := getattr(self, name), Part)}


class OpenBundle(msgspec.Struct, frozen=True, kw_only=True):
    """Verified files of a bundle. `open_bundle` closes them.

    digest: of the bundle's manifest, and so of all files. fds: read-only descriptors by name of the part. image: the
    manifest of the image, with *digest* as its digest: the kernel may come from elsewhere.
    """

    folder: Path
    bundle: Bundle
    digest: str
    fds: dict[str, int]
    image: Manifest
    command_line: str

    def path(self, part: Part) -> str:
        """Return the path of a file."""
        return str(self.folder / part.file)


def make_bundle(image: Image, out: Path, kernel_file: Path | None = None) -> Bundle:
    """Make the bundle *out* of *image*, and return its manifest. Raises SandboxError, OSError.

    kernel_file: the kernel to start instead of the image's.
    """
    if os.path.lexists(out):
        raise UsageError(f"cannot write the guest bundle {out}", "it exists", "Remove it, or name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
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
            data = os.pread(opened.fds["kernel"], boot.MAX_KERNEL_BYTES, 0)
        else:
            data = read_bounded(kernel_file, "kernel", boot.MAX_KERNEL_BYTES)
        check_kernel(data, made.arch, made.kernel_release)
        bundle = Bundle(
            schema_version=SCHEMA,
            arch=made.arch,
            image=made.digest,
            kernel_release=made.kernel_release,
            agent_protocol=PROTOCOL,
            image_manifest=base.put(folder, "image.json", store.encode_manifest(made)),
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
    found = boot.bootable_release(data, arch)
    if found != release:
        why = f"its release is {found}" if found else f"it is not {'a raw Image' if arch == 'aarch64' else 'a bzImage'}"
        fix = f"Add --kernel FILE, with boot/vmlinuz-{release} of Debian's package linux-image-{release}"
        raise ImageError(f"a Mac cannot start this kernel with modules of {release}", why, fix)


@contextlib.contextmanager
def open_bundle(folder: Path, arch: str) -> Iterator[OpenBundle]:
    """Open and verify a bundle for machines of *arch*. Raises ImageError, HostError.

    Large files are hashed once per boot of the host, and again if fstat shows a change (images/verify). The helper
    opens them by path, so only this user may be able to replace them.
    """
    name = f"the guest bundle {folder}"
    if not os.path.lexists(folder):
        raise ImageError(f"cannot open {name}", "it does not exist", FIX)
    try:
        private_dir(folder)
    except HostError as exc:
        raise ImageError(f"cannot use {name}", f"{exc.what}: {exc.why}", "Move it to a folder of your own") from exc
    with contextlib.ExitStack() as stack:
        subject = verify.Subject(name, "", verify.sha256_of, FIX)
        folder_fd = stack.enter_context(verify.opened_folder(folder, subject))
        with verify.opened_file(folder_fd, "manifest.json", subject) as fd:
            data = os.pread(fd, store.MAX_BYTES + 1, 0)
        bundle, hexes = _decoded(data, name, arch), hashlib.sha256(data).hexdigest()
        parts, subject = bundle.parts(), verify.Subject(name, f"vz-{hexes}", verify.sha256_of, FIX)
        fds = dict(zip(parts, verify.opened_parts(folder_fd, [*parts.values()], subject, stack), strict=True))
        yield OpenBundle(
            folder=folder,
            bundle=bundle,
            digest=f"sha256:{hexes}",
            fds=fds,
            image=msgspec.structs.replace(_image(bundle, fds, name), digest=f"sha256:{hexes}"),
            command_line=os.pread(fds["cmdline"], _CMDLINE_MAX, 0).decode("ascii", "replace"),
        )


def _decoded(data: bytes, name: str, arch: str) -> Bundle:
    """Decode the manifest, and check that this x07 can use the bundle here. Raises ImageError."""
    try:
        if (version := msgspec.json.decode(data, type=prepared(store.Version)).schema_version) != SCHEMA:
            raise _bad(name, f"its format is {version[:80]!r}, but this x07 reads {SCHEMA}")
        bundle = msgspec.json.decode(data, type=prepared(Bundle), strict=True)
    except msgspec.MsgspecError as exc:
        raise _bad(name, f"manifest.json is damaged: {exc}") from exc
    if bundle.arch != arch:
        raise _bad(name, f"it is for {bundle.arch[:80]!r}, but this machine is {arch}")
    if bundle.agent_protocol != PROTOCOL:
        raise _bad(name, f"its agent uses protocol {bundle.agent_protocol}, this x07 protocol {PROTOCOL}")
    if bundle.cmdline.bytes > _CMDLINE_MAX or bundle.image_manifest.bytes > store.MAX_BYTES:
        raise _bad(name, "its command line or the manifest of its image is too large")
    return bundle


def _image(bundle: Bundle, fds: dict[str, int], name: str) -> Manifest:
    """Return the manifest of the bundle's image. Raises ImageError if it belongs to another one."""
    image = store.decode_manifest(os.pread(fds["image_manifest"], store.MAX_BYTES, 0), name)
    ours = (image.digest, image.arch, image.kernel_release, image.scratch_disk, image.program is not None)
    if ours != (bundle.image, bundle.arch, bundle.kernel_release, bundle.scratch_disk, bundle.program is not None):
        raise _bad(name, "its files belong to several images")
    if image.guest_code != installed_code():
        raise _bad(name, "another version of x07-sandbox made its image, so its agent may not be compatible")
    return image


def _bad(name: str, why: str) -> ImageError:
    return ImageError(f"cannot use {name}", why, FIX)
