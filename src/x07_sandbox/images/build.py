"""Build an image, or find that it is there: the two stages, under one lock, into the store."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec.structs

from x07_sandbox.errors import ImageError
from x07_sandbox.host.arch import host_arch
from x07_sandbox.host.locks import file_lock
from x07_sandbox.host.paths import cache_folder
from x07_sandbox.images import apt_index, boot, guestcode, manifest, recipe, sources, store, toolchain, verify, wheels
from x07_sandbox.images import base as bases
from x07_sandbox.images import pip as pips

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from x07_sandbox.images.store import Image

WORK_PREFIX = "image-"
X07_COPY = "x07"
WHEELS = "wheels"
SOURCES = "pip-sources"


class Extras(msgspec.Struct, frozen=True, kw_only=True):
    """What an image has beyond the usual.

    include: Debian packages. preload: Python modules. x07: digest of X07's toolchain. pip: Python packages from wheels.
    """

    include: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()
    x07: str = ""
    pip: tuple[manifest.Wheel, ...] = ()

    def base_spec(self) -> bases.BaseSpec:
        """The base that such an image is made of, on this host."""
        wheels = tuple(wheel.sha256 for wheel in self.pip)
        suite = sources.release_codename()
        return bases.BaseSpec(arch=host_arch(), suite=suite, include=self.include, x07=self.x07, pip=wheels)


def build_image(  # noqa: PLR0913 - what an image may be made with, each by its name
    *,
    name: str = store.DEFAULT,
    include: Sequence[str] | None = None,
    preload: Sequence[str] | None = None,
    pip: Sequence[str] | None = None,
    x07: Path | None = None,
    progress: Callable[[str], None],
    fresh: bool = False,
    code: guestcode.GuestCode | None = None,
) -> Image:
    """The image for this installation's guest code, called *name* from now on; what is damaged is made anew.

    include: further Debian packages. preload: Python modules that a program on a saved machine finds imported. pip:
    Python packages, as pip.check_requirements takes them. x07: folder of X07's toolchain. Each None: what the image of
    this name has by now. fresh: fetch and unpack the packages again. code: what runs in the guest; this installation's
    if None. progress: called with one line of text at a time.
    Raises SandboxError; then nothing has changed.
    """
    store.check_name(name)
    asked_packages = None if include is None else recipe.check_packages(include)
    asked_modules = None if preload is None else recipe.check_modules(preload)
    asked_wheels = None if pip is None else pips.check_requirements(pip)
    images = store.images_dir()
    with file_lock(images / ".lock", on_wait=lambda: progress("waiting for another build of an image")):
        for left in leftovers():
            bases.remove_work(left, progress)
        extras = _extras(name, asked_packages, asked_modules, progress, keeps_pip=asked_wheels is None)
        work = _new_work()
        try:
            if x07 is not None:
                progress(f"copying the X07 toolchain {x07}")
                extras = msgspec.structs.replace(extras, x07=toolchain.snapshot(x07, work / X07_COPY))
            if asked_wheels is not None:
                if extras.pip:
                    had = ", ".join(wheel.name for wheel in extras.pip)
                    progress(f"replacing the Python packages that it had: {had}")
                extras = msgspec.structs.replace(extras, pip=_fetch(work, images, extras, asked_wheels, progress))
            digest = _build(work, images, extras, progress, fresh=fresh, code=code or guestcode.read_guest_code())
        finally:
            bases.remove_work(work, progress)
        store.set_name(name, digest)
    return store.load(digest, name)


def _build(
    work: Path, images: Path, extras: Extras, progress: Callable[[str], None], *, fresh: bool, code: guestcode.GuestCode
) -> str:
    spec = extras.base_spec()
    folder = images / f"base-{spec.key}"
    base = None if fresh else bases.read_base(folder)
    if base is not None and (known := _known((base.digest, code.digest, extras.preload), progress)) is not None:
        return known
    if base is None or not _whole(folder, base, progress):
        base = _new_base(work, folder, extras, progress, fresh=fresh)
    draft = manifest.Manifest(
        schema_version=manifest.SCHEMA,
        digest=manifest.NO_DIGEST,
        recipe=recipe.RECIPE,
        arch=spec.arch.name,
        suite=spec.suite,
        include=list(extras.include),
        preload=list(extras.preload),
        x07=extras.x07,
        pip=list(extras.pip),
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
    if target.exists():  # and yet not taken by _known: damaged
        target.rename(work / "old-image")
    place.rename(target)
    return target.name


def _extras(
    name: str,
    packages: tuple[str, ...] | None,
    modules: tuple[str, ...] | None,
    progress: Callable[[str], None],
    *,
    keeps_pip: bool,
) -> Extras:
    """What is asked for, else what the image called *name* has. Raises ImageError where that cannot be told."""
    try:
        image = store.named(name)
    except ImageError as exc:
        if packages is None:
            raise
        if modules is None:
            progress(f"{exc.why}: it will have no modules preloaded")
        image = None
    had: list[list[str]] = [[], []] if image is None else [image.manifest.include, image.manifest.preload]
    if packages is None and had[0]:
        progress(f"with the packages that it had: {', '.join(had[0])}")
    if modules is None and had[1]:
        progress(f"with the modules that it had: {', '.join(had[1])}")
    if keeps_pip and image is not None and image.manifest.pip:
        progress(f"with the Python packages that it had: {', '.join(wheel.name for wheel in image.manifest.pip)}")
    return Extras(
        include=recipe.check_packages(had[0]) if packages is None else packages,
        preload=recipe.check_modules(had[1]) if modules is None else modules,
        x07="" if image is None else image.manifest.x07,
        pip=() if image is None else tuple(image.manifest.pip),
    )


def _fetch(
    work: Path,
    images: Path,
    extras: Extras,
    lines: tuple[str, ...],
    progress: Callable[[str], None],
    *,
    deps: bool = True,
) -> tuple[manifest.Wheel, ...]:
    """Fetch the wheels that satisfy *lines* and fit the image. Raises SandboxError."""
    if not lines:
        return ()
    spec = extras.base_spec()
    place = work / SOURCES
    place.mkdir(mode=0o700)
    file = apt_index.write_sources(place, spec.suite, spec.arch.deb, lambda _note: None)
    python = _python(images, extras) or pips.guest_python(
        apt_index.versions(file, ("python3", "libc6")), spec.arch.name
    )
    return pips.download(work / WHEELS, lines, python, progress, sources_file=file, deps=deps)


def _python(images: Path, extras: Extras) -> pips.GuestPython | None:
    """The Python of the base that is here already; None where there is none."""
    spec = msgspec.structs.replace(extras.base_spec(), x07="", pip=())
    base = bases.read_base(images / f"base-{spec.key}")
    if base is None:
        return None
    return pips.guest_python({package.name: package.version for package in base.packages}, spec.arch.name)


def _known(wanted: tuple[str, str, tuple[str, ...]], progress: Callable[[str], None]) -> str | None:
    """The image that this build would make, if it is there and whole. wanted: base, guest code, modules to preload."""
    for image in store.list_images():
        made = image.manifest
        if (made.base, made.guest_code, tuple(made.preload)) == wanted:
            if problem := verify.first_problem(image):
                progress(f"{problem}: making the image anew")
                return None  # another name's is the same folder
            return image.digest.removeprefix("sha256:")
    return None


def _whole(folder: Path, base: bases.Base, progress: Callable[[str], None]) -> bool:
    try:
        bases.check_base(folder, base)
    except ImageError as exc:
        progress(f"{exc.what}: {exc.why}: fetching it anew")
        return False
    return True


def _new_base(work: Path, folder: Path, extras: Extras, progress: Callable[[str], None], *, fresh: bool) -> bases.Base:
    """Make the base for *extras* in *folder*: from packages, or by adding to the base without the last addition."""
    if extras.pip:
        made = _with_wheels(work, folder, extras, progress, fresh=fresh)
    elif extras.x07:
        if not (work / X07_COPY).exists():
            why = "its X07 toolchain is not here"
            raise ImageError("cannot make the image anew", why, "Name it again: --x07-toolchain DIR")
        below, base = _base_below(work, folder, msgspec.structs.replace(extras, x07=""), progress, fresh=fresh)
        progress("adding the X07 toolchain")
        tar = work / "x07.tar"
        toolchain.pack(work / X07_COPY, tar)
        made = bases.add_layer(work, below, base, tar, x07=extras.x07)
    else:
        made = bases.make_base(work, extras.base_spec(), progress)
    if folder.exists():  # images hold its files by links of their own
        folder.rename(work / f"old-{folder.name}")
    made.rename(folder)
    written = bases.read_base(folder)
    assert written is not None  # noqa: S101
    return written


def _base_below(
    work: Path, folder: Path, extras: Extras, progress: Callable[[str], None], *, fresh: bool
) -> tuple[Path, bases.Base]:
    """The base for *extras*, beside *folder*, made where it is missing or damaged."""
    below = folder.with_name(f"base-{extras.base_spec().key}")
    base = None if fresh else bases.read_base(below)
    if base is None or not _whole(below, base, progress):
        base = _new_base(work, below, extras, progress, fresh=fresh)
    return below, base


def _with_wheels(work: Path, folder: Path, extras: Extras, progress: Callable[[str], None], *, fresh: bool) -> Path:
    """A base folder in *work*: the base without Python packages, and those that *extras* names."""
    without = msgspec.structs.replace(extras, pip=())
    below, base = _base_below(work, folder, without, progress, fresh=fresh)
    python = _python(folder.parent, without)
    assert python is not None  # noqa: S101 - it is made by now
    if not (work / WHEELS).exists():  # they were fetched for an image that is here: the same ones again
        fetched = _fetch(work, folder.parent, without, pips.pinned(extras.pip), progress, deps=False)
        if set(fetched) != set(extras.pip):
            why = "the package index has other files by now"
            raise ImageError("cannot make the image anew", why, "Name its Python packages again: --pip NAME,...")
    progress("unpacking the root file system")
    bases.check_space(work, boot.UNPACKED_MAX * base.root.bytes)
    root = bases.unpack_root(work, below, base)
    progress("adding the Python packages")
    tar = wheels.make_layer(work, sorted((work / WHEELS).iterdir()), root, python.version)
    bases.remove_tree(root)
    return bases.add_layer(work, below, base, tar)


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
    archive, filters = boot.make_initrd(boot_work, folder, base, code, progress)
    initrd = bases.put(place, "initrd.cpio", archive)
    # They are in the initramfs; beside it they can be looked at, and compared with what a result names.
    shown = {name.removesuffix(boot.FILTER_SUFFIX): bases.put(place, name, data) for name, data in filters.items()}
    for part in (base.kernel, base.root, base.scratch):
        os.link(folder / part.file, place / part.file)
    parts = msgspec.structs.replace(draft.parts, initrd=initrd)
    whole = manifest.sealed(msgspec.structs.replace(draft, parts=parts, filters=shown))
    bases.put(place, "manifest.json", manifest.encode(whole))
    return whole


def leftovers() -> list[Path]:
    """What killed builds left; whoever asks holds the lock of the store, so that nobody works there."""
    return sorted(cache_folder("tmp").glob(f"{WORK_PREFIX}*"))


def _new_work() -> Path:
    return Path(tempfile.mkdtemp(prefix=WORK_PREFIX, dir=cache_folder("tmp")))


def remove_from_store(folder: Path, progress: Callable[[str], None]) -> None:
    """Remove an image or a base at once for whoever looks for it; the caller holds the lock of the store.

    Killed on the way it is a leftover. Raises OSError, SandboxError.
    """
    work = _new_work()
    try:
        folder.rename(work / "removed")
    finally:
        bases.remove_work(work, progress)
