"""The user's images: one folder each, named by the digest of its manifest, and names that point to digests.

images/<hex>/{manifest.json,vmlinux,initrd.cpio,root.erofs,scratch.head}
images/names/<name>        the digest, one line
images/base-<key>/         first stage, whose files the images share by hard links
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import msgspec.structs

from x07_sandbox.errors import Flag, ImageError, UsageError
from x07_sandbox.host.arch import Arch, arch_named, host_arch
from x07_sandbox.host.documents import prepared
from x07_sandbox.host.paths import cache_folder, private_dir, read_bounded, replace_file
from x07_sandbox.host.variables import text
from x07_sandbox.host.verdicts import SETTLED_NS, Verdict, file_state
from x07_sandbox.policy.decode import canonical_json

SCHEMA = "x07.sandbox.image@0.1.0"
NO_DIGEST = "sha256:" + "0" * 64  # placeholder until sealed()
MAX_BYTES = 4 * 1024 * 1024
LABEL = "io.x07.guest."  # of a container image, and a number: parts of its manifest as JSON
AGENT = "/usr/lib/x07/agent.zip"  # in a container image
ENTRY = ("/usr/bin/python3", "-I", "-S", "-B", AGENT)  # what a container starts

# Python's $ also matches before a final newline; JSON Schema has no \Z.
_END = r"(?!\n)$"
Sha256 = Annotated[str, msgspec.Meta(pattern=f"^[0-9a-f]{{64}}{_END}")]
FileName = Annotated[str, msgspec.Meta(pattern=rf"^[a-z0-9][a-z0-9._-]{{0,63}}{_END}")]
Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 42)]


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The name, digest and size of one file of the image."""

    file: FileName
    sha256: Sha256
    bytes: Size


class Parts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """The files that a virtual machine starts from. program: the root of programs, if it is an imported one."""

    kernel: Part
    initrd: Part
    root: Part
    scratch: Part
    program: Part | None = None

    def by_name(self) -> dict[str, Part]:
        """Return all parts by name, in a fixed order."""
        return {name: part for name in self.__struct_fields__ if (part := getattr(self, name)) is not None}


class ProgramRoot(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a container image says about its programs. oci: its digest. The other fields are those of its settings."""

    oci: str
    env: dict[str, str]
    workdir: str
    user: str
    entrypoint: list[str]
    cmd: list[str]


class Piece(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A piece of the image's scratch file: the file's next *bytes* bytes, which belong at *offset* of the disk."""

    offset: Size
    bytes: Size


class ScratchDisk(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The recipe of a scratch disk: *bytes* zero bytes, into which the pieces of the scratch file are written."""

    bytes: Size
    pieces: list[Piece]


class Package(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A Debian package in the image: an installed one, or the kernel's."""

    name: str
    version: str
    arch: str


class Wheel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A Python package installed from a wheel, and the wheel's digest."""

    name: str
    version: str
    sha256: Sha256


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """The manifest of an image.

    digest: "sha256:" and the sha256 of the canonical JSON of all other fields.
    base: digest of the first stage (root file system, kernel, modules). guest_code: digest of x07's own code.
    filters: seccomp filters by name.
    preload: Python modules imported in advance in saved VMs; absent if there are none.
    x07: sha256 of the X07 toolchain; absent without it.
    pip: Python packages installed from wheels, with dependencies; absent if there are none.
    program: about the container image whose files programs see instead of this image's; absent if there is none.
    """

    schema_version: str
    digest: Annotated[str, msgspec.Meta(pattern=f"^sha256:[0-9a-f]{{64}}{_END}")]
    recipe: int
    arch: str
    suite: str
    include: list[str]
    base: Sha256
    guest_code: Sha256
    kernel_release: str
    parts: Parts
    scratch_disk: ScratchDisk
    packages: list[Package]
    filters: dict[str, Part]
    preload: list[str] = []
    x07: str = ""
    pip: list[Wheel] = []
    program: ProgramRoot | None = None

    def files(self) -> list[Part]:
        """Return all files of the image except the manifest."""
        return [*self.parts.by_name().values(), *self.filters.values()]

    def holds(self) -> set[str]:
        """Return the names of the image's Debian packages, and "x07" if the image has the X07 toolchain."""
        return {package.name for package in self.packages} | ({"x07"} if self.x07 else set())


_decoder = msgspec.json.Decoder(prepared(Manifest), strict=True)


def digest_of(manifest: Manifest) -> str:
    """Compute the manifest's digest."""
    fields = msgspec.to_builtins(manifest)
    del fields["digest"]
    return "sha256:" + hashlib.sha256(canonical_json(fields)).hexdigest()


def sealed(manifest: Manifest) -> Manifest:
    """Return *manifest* with its digest set."""
    return msgspec.structs.replace(manifest, digest=digest_of(manifest))


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the content of manifest.json: sorted keys, indented by two spaces."""
    return json.dumps(msgspec.to_builtins(manifest), sort_keys=True, indent=2, ensure_ascii=False).encode() + b"\n"


def manifest_in(labels: object) -> bytes:
    """Return the guest image's manifest from the labels of an image as JSON, or nothing if they lack it."""
    found, parts = labels if isinstance(labels, dict) else {}, list[str]()
    while isinstance(part := found.get(f"{LABEL}{len(parts)}"), str):
        parts.append(part)
    return "".join(parts).encode()


def decode_manifest(data: bytes, where: str) -> Manifest:
    """Decode and verify a manifest. where: the image's name in errors. Raises ImageError."""
    if len(data) > MAX_BYTES:
        raise _bad(where, f"it has more than {MAX_BYTES} bytes")
    try:
        if (version := msgspec.json.decode(data, type=prepared(Version)).schema_version) != SCHEMA:
            why = f"its format is {version[:80]!r}, but this x07 reads {SCHEMA}"
            raise ImageError(f"cannot read {where}", why, "Use the x07 that made it, or run x07 image build")
        manifest = _decoder.decode(data)
    except (ValueError, RecursionError) as exc:  # msgspec.MsgspecError, UnicodeDecodeError
        raise _bad(where, str(exc)) from exc
    files = [part.file for part in manifest.files()]
    if len(set(files)) != len(files) or "manifest.json" in files:
        raise _bad(where, "two parts use the same file")
    if sum(piece.bytes for piece in manifest.scratch_disk.pieces) != manifest.parts.scratch.bytes:
        raise _bad(where, "the pieces of the scratch disk do not add up to its part")
    if digest_of(manifest) != manifest.digest:
        raise _bad(where, "its digest does not match its content")
    return manifest


class Version(msgspec.Struct):
    """The format of a document, to read before the rest of it."""

    schema_version: str


def _bad(where: str, why: str) -> ImageError:
    return ImageError(f"cannot use {where}", why, "Run x07 image build")


DEFAULT = "default"
_NAME_MAX = 64
PREFIX_DIGITS = 12
PREFIX = re.compile(rf"[0-9a-f]{{{PREFIX_DIGITS},64}}")
SEE_LIST = "See x07 image list"
BOOT_RECIPE = 2  # bump when boot.py changes its output
INIT = "guest/boot/init.c"
PACK = "guest/boot/pack.py"
FILTERS = "guest/boot/filters.py"
PLACES = "guest/boot/places.py"
_TOOLS = (INIT, PACK, FILTERS, PLACES)


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """A built image."""

    name: str  # by which it was found, else a name that points to it, else empty
    digest: str
    folder: Path
    manifest: Manifest


class DamagedImage(msgspec.Struct, frozen=True, kw_only=True):
    """An image with an unusable manifest."""

    name: str  # a name that points to it, or empty
    digest: str
    problem: ImageError


def build_command(name: str) -> str:
    """Return the command that builds the image called *name*."""
    return "x07 image build" if name == DEFAULT else f"x07 image build --name {name}"


def repair_hint(image: Image) -> str:
    """Return the advice on how to repair an image with damaged files, for errors."""
    name = image.name or _name_of(image.digest.removeprefix("sha256:"))
    if not name:
        return "Remove the image with x07 prune, and use another one: without a name, it cannot be repaired"
    return f"Run {build_command(name)}, and if it happens again check the disk"


def images_dir() -> Path:
    """Return the store's folder. Create it if it is missing."""
    return cache_folder("images")


def check_name(name: str) -> str:
    """Return *name* if it is valid. Raises UsageError."""
    if not re.fullmatch(rf"[a-z0-9][a-z0-9._-]{{0,{_NAME_MAX - 1}}}", name) or re.fullmatch(r"[0-9a-f]{12,}", name):
        if re.search("[:/@]", name):
            why = "it is the name of a container image, which only podman and docker use (--backend podman)"
            instead = ("For a virtual machine, run x07 image build, then use ", Flag(f"--image {DEFAULT}"))
            raise UsageError(f"cannot use {name[:80]!r} as a guest image", why, instead)
        why = "it consists of 12 or more hexadecimal digits, as the start of a digest does"
        if not name:
            why = "it is empty"
        elif len(name) > _NAME_MAX:
            why = f"it has {len(name)} characters, and a name has at most {_NAME_MAX}"
        elif bad := re.search(r"[^a-z0-9._-]|^[._-]", name):
            why = f"{bad[0]!r} is not allowed {'at the start' if bad[0] in '._-' else 'in a name'}"
        fix = "Choose another name of a-z, 0-9, '.', '_' and '-'"
        raise UsageError(f"cannot use {name[:80]!r} as an image name", why, fix)
    return name


def find_image(ref: str | None) -> Image:
    """Return the image that *ref* refers to.

    ref: a name, "sha256:<hex>", or a unique prefix of a digest, with at least 12 hex digits. None stands for the value
    of X07_VM_GUEST_IMAGE, or else "default".
    Raises ImageError if the image is missing, damaged or of another format.
    """
    ref = text("X07_VM_GUEST_IMAGE") if ref is None else ref
    wanted = DEFAULT if ref is None else ref
    hexes = wanted.removeprefix("sha256:")
    if wanted.startswith("sha256:") or PREFIX.fullmatch(wanted):
        if not PREFIX.fullmatch(hexes):
            why = f"a digest needs at least {PREFIX_DIGITS} lower-case hex digits"
            raise ImageError(f"there is no guest image {wanted[:80]}", why, SEE_LIST)
        return load(_by_prefix(hexes))
    image = named(wanted)
    if image is None:
        raise _missing(wanted, f"there is no guest image {wanted!r}" if ref else "there is no guest image")
    return image


def arch_of(ref: str | None) -> Arch:
    """Return the architecture of the image *ref* (see `find_image`), or this host's if the store has no such image."""
    if ref is None and text("X07_VM_GUEST_IMAGE") is None:
        return host_arch()  # the image named default is always for this host
    with contextlib.suppress(ImageError, UsageError):  # the name of an engine's image; a missing one is reported later
        return arch_named(find_image(ref).manifest.arch)
    return host_arch()


def _missing(name: str, what: str) -> ImageError:
    names = all_names()
    digest = names.get(name)
    if digest is not None:
        return ImageError(what, "the folder of the image is missing", _rebuild_hint(digest, name))
    command = f"Run {build_command(name)}"
    if names:
        fix = f"{command}, or use one of these: {', '.join(sorted(names))}"
        return ImageError(what, "the existing images have other names", fix)
    return ImageError(what, "no guest image has been built yet", command)


def named(name: str) -> Image | None:
    """Return the image called *name*, or None if there is none. Raises ImageError if it is damaged."""
    digest = all_names().get(check_name(name))
    return None if digest is None or not (images_dir() / digest).is_dir() else load(digest, name)


def list_images() -> list[Image]:
    """Return the readable images: by name, then those without a name. An image with two names appears twice."""
    return [image for image in _all() if isinstance(image, Image)]


def damaged_images() -> list[DamagedImage]:
    """Return all images with an unusable manifest, in the order of `list_images`."""
    return [image for image in _all() if isinstance(image, DamagedImage)]


def _all() -> Iterator[Image | DamagedImage]:
    names = all_names()
    nameless = [("", digest) for digest in sorted(set(_digests()) - set(names.values()))]
    for name, digest in [*sorted(names.items()), *nameless]:
        try:
            yield load(digest, name)
        except ImageError as exc:
            yield DamagedImage(name=name, digest=f"sha256:{digest}", problem=exc)


def image_is_current(image: Image) -> bool:
    """Return whether the image contains this installation's guest code. If not, rebuilding takes seconds."""
    return image.manifest.guest_code == installed_code()


def load(digest: str, name: str = "") -> Image:
    """Load the image in the folder *digest* (hex). Raises ImageError."""
    folder = images_dir() / digest
    what = f"guest image {digest[:PREFIX_DIGITS]}"
    try:
        read = decode_manifest(_read(folder / "manifest.json"), what)
    except ImageError as exc:
        raise ImageError(exc.what, exc.why, _rebuild_hint(digest, name)) from exc
    if read.digest != f"sha256:{digest}":
        raise ImageError(f"cannot use {what}", "its manifest belongs to another image", _rebuild_hint(digest, name))
    return Image(name=name, digest=read.digest, folder=folder, manifest=read)


def _rebuild_hint(digest: str, name: str) -> str:
    """Return the advice for an image with an unusable manifest, whose list of packages is therefore lost."""
    if name := name or _name_of(digest):
        return f"Run {build_command(name)} --no-include, or use --include with the packages that it had"
    return f"It has no name: remove {images_dir() / digest}"


def _name_of(digest: str) -> str:
    return next((name for name, pointed in sorted(all_names().items()) if pointed == digest), "")


def set_name(name: str, digest: str) -> None:
    """Let *name* point to *digest* (hex), atomically."""
    names = private_dir(images_dir() / "names")
    replace_file(names / check_name(name), f"{digest}\n".encode(), sync=True)


def remove_name(name: str) -> None:
    """Remove *name*; the image stays. Raises OSError."""
    (images_dir() / "names" / check_name(name)).unlink()


def all_names() -> dict[str, str]:
    """Return the digest (hex) of each name."""
    folder = images_dir() / "names"
    names = {}
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(folder):
            if re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", entry.name):
                digest = _read(folder / entry.name)[:65].decode(errors="replace").strip()
                if re.fullmatch(r"[0-9a-f]{64}", digest):
                    names[entry.name] = digest
    return names


def _digests() -> list[str]:
    return [entry.name for entry in os.scandir(images_dir()) if re.fullmatch(r"[0-9a-f]{64}", entry.name)]


def _by_prefix(hexes: str) -> str:
    found = [digest for digest in _digests() if digest.startswith(hexes)]
    if not found:
        raise ImageError(f"there is no guest image {hexes}", "no image has this digest", SEE_LIST)
    if len(found) > 1:
        why = "the digests of several images begin like this"
        raise ImageError(f"cannot choose guest image {hexes}", why, SEE_LIST)
    return found[0]


def _read(path: Path) -> bytes:
    try:
        return read_bounded(path, "file", MAX_BYTES)
    except UsageError as exc:
        raise ImageError(exc.what, exc.why, "Remove it, then try again") from exc


class GuestCode(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of the guest's files, by path below the package."""

    agent: dict[str, bytes]  # Python code that runs in the guest
    tools: dict[str, bytes]  # files that only the second stage of an image build needs

    @property
    def digest(self) -> str:
        """The value of `guest_code` in the manifest of an image with this code."""
        files = {name: hashlib.sha256(data).hexdigest() for name, data in (self.agent | self.tools).items()}
        return hashlib.sha256(canonical_json([BOOT_RECIPE, files])).hexdigest()

    def write(self, folder: Path) -> None:
        """Write the tools to *folder*, and the agent's package to the folder `agent` in it."""
        files = self.tools | {f"agent/x07_sandbox/{name}": data for name, data in self.agent.items()}
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)


_PACKAGE = Path(__file__).parents[1]


def installed_code(root: Path = _PACKAGE) -> str:
    """Return the digest of this installation's guest code: read once per boot of the host, and after each change."""
    states = _states(root)
    known = Verdict("guest-code", str(root), key=states)
    if digest := known.read().get("digest"):
        return str(digest)
    digest = read_guest_code(root).digest
    if max(state[-1] for state in states) < time.time_ns() - SETTLED_NS and states == _states(root):
        with contextlib.suppress(OSError):
            known.write({"digest": digest})
    return digest


def _states(root: Path) -> list[tuple[Any, ...]]:
    return [file_state(path) for path in _code_files(root)]


def _code_files(root: Path) -> list[str]:
    """Return the paths of the files that the guest gets, sorted."""
    found = [f"{root}/{name}" for name in ("errors.py", "kernel.py", "libseccomp.py", *_TOOLS)]
    for folder in (f"{root}/channel", f"{root}/guest"):
        found += [entry.path for entry in os.scandir(folder) if entry.name.endswith(".py")]
    return sorted(found)


def read_guest_code(root: Path = _PACKAGE) -> GuestCode:
    """Read the guest's files below *root*, by default this package. The guest gets an empty __init__ of the package."""
    files = {path.removeprefix(f"{root}/"): Path(path).read_bytes() for path in _code_files(root)}
    tools = {name: files.pop(name) for name in _TOOLS}
    return GuestCode(agent={"__init__.py": b""} | files, tools=tools)
