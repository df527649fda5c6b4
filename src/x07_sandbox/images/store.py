"""The user's images: one folder each, named by digest, and names that point to digests.

images/<hex>/{manifest.json,vmlinux,initrd.cpio,root.erofs,scratch.head}
images/names/<name>        the digest, one line
images/base-<key>/         first stage, whose files the images share by hard links
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from pathlib import Path

import msgspec

from x07_sandbox.errors import ImageError, UsageError
from x07_sandbox.host.paths import cache_dir, private_dir, replace_file
from x07_sandbox.images import guestcode, manifest
from x07_sandbox.images.manifest import Manifest

DEFAULT = "default"
PREFIX_DIGITS = 12
PREFIX = re.compile(rf"[0-9a-f]{{{PREFIX_DIGITS},64}}")
FIX = "Run x07 image build"


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """A built image. name: the one it was found by, else one that points to it, else empty."""

    name: str
    digest: str
    folder: Path
    manifest: Manifest


def images_dir() -> Path:
    """The store's folder, checked; made when missing."""
    return private_dir(cache_dir() / "images")


def check_name(name: str) -> str:
    """*name* if an image can be called so. Raises UsageError."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name) or re.fullmatch(r"[0-9a-f]{12,}", name):
        raise UsageError(
            f"cannot call an image {name!r}",
            "a name has 1 to 64 of a-z, 0-9, '.', '_', '-', and is no digest",
            "Choose another name",
        )
    return name


def find_image(ref: str | None) -> Image:
    """The image called *ref*: a name, "sha256:<hex>", or a unique prefix of at least 12 hex digits; None is "default".

    Raises ImageError when there is none, or it is damaged or of another format.
    """
    wanted = DEFAULT if ref is None else ref
    hexes = wanted.removeprefix("sha256:")
    if wanted.startswith("sha256:") or PREFIX.fullmatch(wanted):
        if not PREFIX.fullmatch(hexes):
            raise ImageError(
                f"no guest image {wanted[:80]}",
                f"a digest is given by at least {PREFIX_DIGITS} lower-case hex digits",
                "See x07 image list",
            )
        return load(_by_prefix(hexes))
    digest = _names().get(check_name(wanted))
    if digest is None or not (images_dir() / digest).is_dir():
        raise ImageError(
            f"no guest image {wanted!r}" if ref else "no guest image",
            "none was built" if digest is None else "its folder is gone",
            FIX,
        )
    return load(digest, wanted)


def list_images() -> list[Image]:
    """All readable images: those with names first, by name, then by digest. One with two names is there twice."""
    names = _names()
    images = []
    for name, digest in sorted(names.items()):
        with contextlib.suppress(ImageError):
            images.append(load(digest, name))
    for digest in sorted(set(_digests()) - set(names.values())):
        with contextlib.suppress(ImageError):
            images.append(load(digest))
    return images


def image_is_current(image: Image) -> bool:
    """Whether the image holds this installation's guest code; x07 image build renews it in seconds."""
    return image.manifest.guest_code == guestcode.read_guest_code().digest


def load(digest: str, name: str = "") -> Image:
    """The image in the folder *digest* (hex). Raises ImageError."""
    folder = images_dir() / digest
    read = manifest.decode(_read(folder / "manifest.json"), f"guest image {digest[:PREFIX_DIGITS]}")
    if read.digest != f"sha256:{digest}":
        raise ImageError(
            f"cannot use guest image {digest[:PREFIX_DIGITS]}", "its manifest belongs to another image", FIX
        )
    return Image(name=name, digest=read.digest, folder=folder, manifest=read)


def set_name(name: str, digest: str) -> None:
    """Let *name* point to *digest* (hex); readers see the old one or the new one."""
    names = private_dir(images_dir() / "names")
    replace_file(names / check_name(name), f"{digest}\n".encode(), sync=True)


def _names() -> dict[str, str]:
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
    if len(found) != 1:
        raise ImageError(
            f"no guest image {hexes}",
            "several begin like this" if found else "none was built with this digest",
            "See x07 image list" if found else FIX,
        )
    return found[0]


def _read(path: Path) -> bytes:
    """A small file of ours, no link. Raises ImageError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid():
                raise ImageError(
                    f"cannot use {path}", "it is not a regular file of yours", "Remove it, then run x07 image build"
                )
            return file.read(manifest.MAX_BYTES + 1)
    except OSError as exc:
        raise ImageError(f"cannot read {path}", exc.strerror or str(exc), FIX) from exc
