"""manifest.json of a guest image: model, encoding and digest.

The manifest contains no name, host or time, so that builds from the same inputs are identical.
"""

import hashlib
import json
from typing import Annotated

import msgspec
import msgspec.structs

from x07_sandbox.errors import ImageError
from x07_sandbox.host.decoding import prepared
from x07_sandbox.policy.default import canonical_json

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


def encode(manifest: Manifest) -> bytes:
    """Return the content of manifest.json: sorted keys, indented by two spaces."""
    return json.dumps(msgspec.to_builtins(manifest), sort_keys=True, indent=2, ensure_ascii=False).encode() + b"\n"


def manifest_in(labels: object) -> bytes:
    """Return the guest image's manifest from the labels of an image as JSON, or nothing if they lack it."""
    found, parts = labels if isinstance(labels, dict) else {}, list[str]()
    while isinstance(part := found.get(f"{LABEL}{len(parts)}"), str):
        parts.append(part)
    return "".join(parts).encode()


def decode(data: bytes, where: str) -> Manifest:
    """Decode and verify a manifest. where: the image's name in errors. Raises ImageError."""
    if len(data) > MAX_BYTES:
        raise _bad(where, f"it has more than {MAX_BYTES} bytes")
    try:
        version = msgspec.json.decode(data, type=prepared(Version)).schema_version
    except (ValueError, RecursionError) as exc:  # msgspec.MsgspecError, UnicodeDecodeError
        raise _bad(where, str(exc)) from exc
    if version != SCHEMA:
        why = f"its format is {version[:80]!r}, but this x07 reads {SCHEMA}"
        raise ImageError(f"cannot read {where}", why, "Use the x07 that made it, or run x07 image build")
    try:
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
