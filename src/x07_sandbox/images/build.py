"""Build an image, or find that it is there: the two stages, under one lock, into the store."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec.structs

from x07_sandbox.host.arch import host_arch
from x07_sandbox.host.locks import file_lock
from x07_sandbox.host.paths import cache_dir, private_dir
from x07_sandbox.images import base as bases
from x07_sandbox.images import boot, guestcode, manifest, recipe, sources, store

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from x07_sandbox.images.store import Image

WORK_PREFIX = "image-"


def build_image(
    *,
    name: str = store.DEFAULT,
    include: Sequence[str] = (),
    progress: Callable[[str], None],
    fresh: bool = False,
    code: guestcode.GuestCode | None = None,
) -> Image:
    """The image for this installation's guest code, called *name* from now on.

    include: further Debian packages. fresh: fetch and unpack the packages again although a base is there.
    code: what runs in the guest; this installation's if None.
    progress: called with one line of text at a time. Raises SandboxError; then nothing has changed.
    """
    store.check_name(name)
    packages = recipe.check_packages(include)
    images = store.images_dir()
    with file_lock(images / ".lock", on_wait=lambda: progress("waiting for another build of an image")):
        _remove_leftovers(progress)
        work = Path(tempfile.mkdtemp(prefix=WORK_PREFIX, dir=_work_dir()))
        try:
            digest = _build(work, images, packages, progress, fresh=fresh, code=code or guestcode.read_guest_code())
        finally:
            bases.remove_work(work, progress)
        store.set_name(name, digest)
    return store.load(digest, name)


def _build(
    work: Path,
    images: Path,
    include: Sequence[str],
    progress: Callable[[str], None],
    *,
    fresh: bool,
    code: guestcode.GuestCode,
) -> str:
    arch = host_arch()
    suite = sources.release_codename()
    folder = images / f"base-{bases.base_key(arch, suite, include)}"
    base = None if fresh else bases.read_base(folder)
    if base is None:
        made = bases.make_base(work, arch, suite, include, progress)
        if folder.exists():
            # Images hold the old base's files by links of their own.
            folder.rename(work / "old-base")
        made.rename(folder)
        base = bases.read_base(folder)
        assert base is not None  # noqa: S101 - just written
    elif (known := _known(base.digest, code.digest)) is not None:
        return known
    draft = manifest.Manifest(
        schema_version=manifest.SCHEMA,
        digest=manifest.NO_DIGEST,
        recipe=recipe.RECIPE,
        arch=arch.name,
        suite=suite,
        include=list(include),
        base=base.digest,
        guest_code=code.digest,
        kernel_release=base.kernel_release,
        parts=manifest.Parts(kernel=base.kernel, initrd=base.kernel, root=base.root, scratch=base.scratch),
        scratch_disk=base.scratch_disk,
        packages=base.packages,
        filters={},
    )
    place = work / "image"
    whole = _second_stage(place, folder, base, code, draft, progress)
    target = images / whole.digest.removeprefix("sha256:")
    if target.exists():
        # Of the same name and yet not taken by _known: damaged.
        target.rename(work / "old-image")
    place.rename(target)
    return target.name


def _known(base_digest: str, code_digest: str) -> str | None:
    """The image that this build would make, if it is there, whole by names and sizes."""
    for image in store.list_images():
        made = image.manifest
        if (
            made.base == base_digest
            and made.guest_code == code_digest
            and all(_has(image, part) for part in made.parts.all())
        ):
            return image.digest.removeprefix("sha256:")
    return None


def _has(image: Image, part: manifest.Part) -> bool:
    path = image.folder / part.file
    return path.is_file() and path.stat().st_size == part.bytes


def _second_stage(
    place: Path,
    folder: Path,
    base: bases.Base,
    code: guestcode.GuestCode,
    draft: manifest.Manifest,
    progress: Callable[[str], None],
) -> manifest.Manifest:
    """Make the image's folder at *place*: files of the base by link, the initramfs, the manifest."""
    place.mkdir(mode=0o700)
    boot_work = place.with_name("boot")
    boot_work.mkdir(mode=0o700)
    initrd = bases.put(place, "initrd.cpio", boot.make_initrd(boot_work, folder, base, code, progress))
    for part in (base.kernel, base.root, base.scratch):
        os.link(folder / part.file, place / part.file)
    whole = manifest.sealed(msgspec.structs.replace(draft, parts=msgspec.structs.replace(draft.parts, initrd=initrd)))
    bases.put(place, "manifest.json", manifest.encode(whole))
    return whole


def _work_dir() -> Path:
    return private_dir(cache_dir() / "tmp")


def _remove_leftovers(progress: Callable[[str], None]) -> None:
    """Remove what killed builds left: the lock is ours, so nobody works there."""
    for work in sorted(_work_dir().glob(f"{WORK_PREFIX}*")):
        bases.remove_work(work, progress)
