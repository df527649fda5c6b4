"""Building an image, or reusing an existing one: both stages, under the store's lock; packing of the X07 toolchain."""

import errno
import hashlib
import os
import stat
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec.structs

from x07_sandbox.errors import Flag, HostError, ImageError, UsageError
from x07_sandbox.host.arch import ARCHES, Arch, arch_named, host_arch, is_foreign
from x07_sandbox.host.locks import file_lock
from x07_sandbox.host.paths import cache_folder
from x07_sandbox.images import base as bases
from x07_sandbox.images import boot, foreign, guestcode, manifest, recipe, sources, store, tar, verify
from x07_sandbox.images import pip as pips
from x07_sandbox.images.store import Image

WORK_PREFIX = "image-"
X07_TAR = "x07.tar"
WHEELS = "wheels"
SOURCES = "pip-sources"


class Extras(msgspec.Struct, frozen=True, kw_only=True):
    """The architecture and the optional contents of an image."""

    arch: Arch
    include: tuple[str, ...] = ()  # Debian packages
    preload: tuple[str, ...] = ()  # Python modules
    x07: str = ""  # digest of the X07 toolchain
    pip: tuple[manifest.Wheel, ...] = ()  # Python packages from wheels
    program: manifest.ProgramRoot | None = None  # of an imported image
    program_file: Path | None = None  # its root file system

    def base_spec(self) -> bases.BaseSpec:
        """Return the inputs of the image's base."""
        wheels = tuple(wheel.sha256 for wheel in self.pip)
        suite = sources.release_codename()
        return bases.BaseSpec(arch=self.arch, suite=suite, include=self.include, x07=self.x07, pip=wheels)


def build_image(  # noqa: PLR0913 - one keyword per ingredient
    *,
    name: str = store.DEFAULT,
    include: Sequence[str] | None = None,
    preload: Sequence[str] | None = None,
    pip: Sequence[str] | None = None,
    x07: Path | None = None,
    progress: Callable[[str], None],
    fresh: bool = False,
    code: guestcode.GuestCode | None = None,
    arch: str | None = None,
) -> Image:
    """Build the image called *name*, or reuse an intact image with the same contents.

    include: further Debian packages. preload: Python modules to import in saved VMs. pip: Python packages (see
    pip.check_requirements). x07: folder of the X07 toolchain. None keeps the packages, modules or toolchain of the
    image that is called *name* now. fresh: download the packages again. code: the guest code, by default this
    installation's. progress: called with lines of text. arch: the architecture (`arch_named`), by default that of the
    image called *name* now, or else this host's. Raises SandboxError; no image or name is then changed.
    """
    store.check_name(name)
    wanted = None if arch is None else arch_named(arch)
    packages = None if include is None else recipe.check_packages(include)
    modules = None if preload is None else recipe.check_modules(preload)
    requirements = None if pip is None else pips.check_requirements(pip)
    images = store.images_dir()
    with file_lock(images / ".lock", on_wait=lambda: progress("waiting for another image build")):
        for folder in leftovers():
            bases.remove_work(folder, progress)
        extras = _extras(name, wanted, packages, modules, progress, keeps_pip=requirements is None)
        work = new_work()
        builder = _Builder(work, images, progress, fresh=fresh, code=code or guestcode.read_guest_code())
        try:
            if x07 is not None:
                progress(f"copying the X07 toolchain {x07}")
                extras = msgspec.structs.replace(extras, x07=pack_toolchain(x07, work / X07_TAR))
            if requirements is not None:
                if extras.pip:
                    progress(f"replacing the Python packages: {', '.join(wheel.name for wheel in extras.pip)}")
                extras = msgspec.structs.replace(extras, pip=builder.download(extras, requirements))
            digest = builder.build(extras)
        finally:
            bases.remove_work(work, progress)
        store.set_name(name, digest)
    return store.load(digest, name)


def import_image(source: str, name: str, progress: Callable[[str], None]) -> tuple[Image, int]:
    """Make the image called *name*, whose programs see the files of a container image. Raises SandboxError.

    source: see oci.make_root. Return the image, and how many devices and sockets were left out.
    """
    from x07_sandbox.images import oci  # few images are imported

    store.check_name(name)
    images = store.images_dir()
    with file_lock(images / ".lock", on_wait=lambda: progress("waiting for another image build")):
        for folder in leftovers():
            bases.remove_work(folder, progress)
        work = new_work()
        try:
            program, left_out = oci.make_root(source, work, work / bases.TAR_FILE, progress)
            progress("making the root file system")
            file = work / PROGRAM_FILE
            bases.make_root(work, file, work / bases.TAR_FILE)
            (work / bases.TAR_FILE).unlink()
            extras = Extras(arch=host_arch(), program=program, program_file=file)
            digest = _Builder(work, images, progress, fresh=False, code=guestcode.read_guest_code()).build(extras)
        finally:
            bases.remove_work(work, progress)
        store.set_name(name, digest)
    return store.load(digest, name), left_out


def _extras(
    name: str,
    arch: Arch | None,
    packages: tuple[str, ...] | None,
    modules: tuple[str, ...] | None,
    progress: Callable[[str], None],
    *,
    keeps_pip: bool,
) -> Extras:
    """Combine the requested contents with those of the image *name*. Raises ImageError if the latter are unknown."""
    try:
        image = store.named(name)
    except ImageError as exc:
        if packages is None:
            raise
        if modules is None:
            progress(f"{exc.why}: no modules will be preloaded")
        image = None
    if image is None:
        return Extras(arch=_architecture(name, arch), include=packages or (), preload=modules or ())
    old = image.manifest
    kept = {
        "packages": old.include if packages is None else [],
        "preloaded modules": old.preload if modules is None else [],
        "Python packages": [wheel.name for wheel in old.pip] if keeps_pip else [],
    }
    for kind, names in kept.items():
        if names:
            progress(f"keeping the {kind}: {', '.join(names)}")
    return Extras(
        arch=_architecture(name, arch, arch_named(old.arch)),
        include=recipe.check_packages(old.include) if packages is None else packages,
        preload=recipe.check_modules(old.preload) if modules is None else modules,
        x07=old.x07,
        pip=tuple(old.pip),
        program=old.program,
        program_file=None if old.parts.program is None else image.folder / old.parts.program.file,
    )


def _architecture(name: str, wanted: Arch | None, old: Arch | None = None) -> Arch:
    """Return the architecture of the image called *name*. old: that of the present image. Raises UsageError.

    The image named default is always for this host, so that no job gets an emulated processor by accident.
    """
    arch = wanted or old or next((each for each in ARCHES.values() if each.deb == name), host_arch())
    what = f"cannot build the image {name!r} for {arch.deb}"
    fix = ("Use another name, such as ", Flag(f"--name {arch.deb}"))
    if old is not None and old.name != arch.name:
        raise UsageError(what, f"the present image of this name is for {old.deb}", fix)
    if name == store.DEFAULT and is_foreign(arch):
        raise UsageError(what, f"this host is {host_arch().deb}, and jobs use this image unless told otherwise", fix)
    return arch


class _Builder:
    """One build. work: its private folder. images: the store's folder. fresh: do not reuse bases."""

    def __init__(
        self, work: Path, images: Path, progress: Callable[[str], None], *, fresh: bool, code: guestcode.GuestCode
    ) -> None:
        self._work = work
        self._images = images
        self._progress = progress
        self._fresh = fresh
        self._code = code

    def build(self, extras: Extras) -> str:
        """Build the image, unless it exists, and return its digest (hex). Raises SandboxError."""
        base = None if self._fresh else bases.read_base(self._base_folder(extras))
        if base is not None and (digest := self._existing(base, extras)):
            return digest
        foreign.require_execution(extras.arch)
        folder, base = self._base(extras)
        spec = extras.base_spec()
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
            guest_code=self._code.digest,
            kernel_release=base.kernel_release,
            parts=manifest.Parts(kernel=base.kernel, initrd=base.kernel, root=base.root, scratch=base.scratch),
            scratch_disk=base.scratch_disk,
            packages=base.packages,
            filters={},
            program=extras.program,
        )
        made = self._work / "image"
        image = self._second_stage(made, folder, base, draft, extras.program_file)
        target = self._images / image.digest.removeprefix("sha256:")
        if target.exists():  # damaged, since it was not reused
            target.rename(self._work / "old-image")
        made.rename(target)
        return target.name

    def download(self, extras: Extras, lines: tuple[str, ...], *, deps: bool = True) -> tuple[manifest.Wheel, ...]:
        """Download the wheels that satisfy *lines* and fit the image. Raises SandboxError."""
        if not lines:
            return ()
        spec = extras.base_spec()
        folder = self._work / SOURCES
        folder.mkdir(mode=0o700)
        file = sources.write_sources(folder, spec.suite, spec.arch.deb, lambda _note: None)
        plain = msgspec.structs.replace(extras, x07="", pip=())
        base = bases.read_base(self._base_folder(plain))
        if base is not None:
            python = _python(base, spec)
        else:
            python = pips.guest_python(sources.versions(file, ("python3", "libc6")), spec.arch.name)
        return pips.download(self._work / WHEELS, lines, python, self._progress, sources_file=file, deps=deps)

    def _base_folder(self, extras: Extras) -> Path:
        return self._images / f"base-{extras.base_spec().key}"

    def _existing(self, base: bases.Base, extras: Extras) -> str:
        """Return the digest (hex) of an intact image with these contents, or "" if there is none."""
        wanted = base.digest, self._code.digest, list(extras.preload), extras.program
        for image in store.list_images():
            made = image.manifest
            if (made.base, made.guest_code, made.preload, made.program) == wanted:
                if problems := verify.verify_image(image, use_record=True):
                    self._progress(f"{problems[0]}: rebuilding the image")
                    return ""  # images with the same contents share a folder
                return image.digest.removeprefix("sha256:")
        return ""

    def _base(self, extras: Extras) -> tuple[Path, bases.Base]:
        """Return the image's base, after its folder. Make the base if it is missing or damaged. Raises SandboxError."""
        folder = self._base_folder(extras)
        base = None if self._fresh else bases.read_base(folder)
        if base is not None:
            try:
                bases.check_base(folder, base)
            except ImageError as exc:
                self._progress(f"{exc.what} ({exc.why}); downloading it again")
            else:
                return folder, base
        made = self._new_base(extras)
        if folder.exists():  # images have links to its files
            folder.rename(self._work / f"old-{folder.name}")
        made.rename(folder)
        base = bases.read_base(folder)
        assert base is not None  # noqa: S101
        return folder, base

    def _new_base(self, extras: Extras) -> Path:
        """Make a base in the work folder: from Debian packages, or by adding the X07 toolchain or wheels to a base."""
        work = self._work
        if extras.pip:
            return self._with_wheels(extras)
        if not extras.x07:
            return bases.make_base(work, extras.base_spec(), self._progress)
        if not (work / X07_TAR).exists():
            why = "this host has no copy of the image's X07 toolchain"
            raise ImageError("cannot rebuild the image", why, "Add --x07-toolchain DIR")
        below, base = self._base(msgspec.structs.replace(extras, x07=""))
        self._progress("adding the X07 toolchain")
        return bases.add_layer(work, below, base, work / X07_TAR, x07=extras.x07)

    def _with_wheels(self, extras: Extras) -> Path:
        work = self._work
        without = msgspec.structs.replace(extras, pip=())
        below, base = self._base(without)
        if not (work / WHEELS).exists():  # a rebuild: download the same wheels again
            downloaded = self.download(without, pips.pinned(extras.pip), deps=False)
            if set(downloaded) != set(extras.pip):
                why = "the package index has different files now"
                raise ImageError("cannot rebuild the image", why, "Request its Python packages again: --pip NAME,...")
        self._progress("unpacking the root file system")
        bases.check_space(work, boot.UNPACKED_MAX * base.root.bytes)
        root = bases.unpack_root(work, below / base.root.file)
        self._progress("adding the Python packages")
        python = _python(base, extras.base_spec())
        tar = pips.make_layer(work, sorted((work / WHEELS).iterdir()), root, python.version)
        bases.remove_tree(root)
        return bases.add_layer(work, below, base, tar)

    def _second_stage(
        self, made: Path, folder: Path, base: bases.Base, draft: manifest.Manifest, program: Path | None
    ) -> manifest.Manifest:
        """Make the image in the folder *made*: links to the base's files, the initramfs, and the manifest."""
        made.mkdir(mode=0o700)
        boot_work = made.with_name("boot")
        boot_work.mkdir(mode=0o700)
        archive, filters = boot.make_initrd(boot_work, folder, base, ARCHES[draft.arch], self._code, self._progress)
        initrd = bases.put(made, "initrd.cpio", archive)
        # Copies of the filters in the initramfs, for inspection.
        copies = {name.removesuffix(boot.FILTER_SUFFIX): bases.put(made, name, data) for name, data in filters.items()}
        for part in (base.kernel, base.root, base.scratch):
            os.link(folder / part.file, made / part.file)
        parts = msgspec.structs.replace(draft.parts, initrd=initrd)
        if program is not None:
            os.link(program, made / PROGRAM_FILE)
            parts = msgspec.structs.replace(parts, program=bases.part_of(made, PROGRAM_FILE))
        image = manifest.sealed(msgspec.structs.replace(draft, parts=parts, filters=copies))
        bases.put(made, "manifest.json", manifest.encode(image))
        return image


def _python(base: bases.Base, spec: bases.BaseSpec) -> pips.GuestPython:
    return pips.guest_python({package.name: package.version for package in base.packages}, spec.arch.name)


def leftovers() -> list[Path]:
    """Return the folders of killed builds; the caller must hold the store's lock."""
    return sorted(cache_folder("tmp").glob(f"{WORK_PREFIX}*"))


def new_work() -> Path:
    """Make the folder of a build; the caller must hold the store's lock."""
    return Path(tempfile.mkdtemp(prefix=WORK_PREFIX, dir=cache_folder("tmp")))


def remove_from_store(folder: Path, progress: Callable[[str], None]) -> None:
    """Remove an image or a base atomically; the caller must hold the store's lock. Raises OSError, SandboxError."""
    work = new_work()
    try:
        folder.rename(work / "removed")
    finally:
        bases.remove_work(work, progress)


PROGRAM_FILE: Final = "program.erofs"
_PLACE: Final = "usr/local/lib/x07"
ENTRIES_MAX: Final = 100_000
MAX_BYTES: Final = 2 * 1024**3
_FIX: Final = "Choose a folder with the X07 toolchain for Linux: bin/x07-os-runner and the files it needs"


def pack_toolchain(source: Path, target: Path) -> str:
    """Write the toolchain at *source* to the new tar archive *target*, to be unpacked at the root of an image.

    Return the archive's digest, which depends on names, contents and executable bits. Raises UsageError, HostError. The
    archive contains the parent folders too, since mkfs.erofs would give missing ones the mode 0777.
    """
    if not os.access(source / "bin" / "x07-os-runner", os.X_OK):
        raise UsageError(f"cannot use the X07 toolchain {source}", "bin/x07-os-runner is not an executable", _FIX)
    try:
        total = 0
        for count, path in enumerate(tar.paths_below(source), start=1):
            total += _checked_size(source, path)
            if count > ENTRIES_MAX or total > MAX_BYTES:
                why = f"it has more than {ENTRIES_MAX} entries or {MAX_BYTES >> 20} MiB"
                raise UsageError(f"cannot use the X07 toolchain {source}", why, _FIX)
        with tarfile.open(target, "x", format=tarfile.PAX_FORMAT) as archive:
            for name in (".", "usr", "usr/local", "usr/local/bin", "usr/local/lib", _PLACE):
                archive.addfile(tar.entry(name, tarfile.DIRTYPE, 0o755))
            tar.add_tree(archive, source, f"{_PLACE}/")
            for path in sorted((source / "bin").iterdir()):
                link = f"../lib/x07/bin/{path.name}"
                archive.addfile(tar.entry(f"usr/local/bin/{path.name}", tarfile.SYMTYPE, 0o777, link=link))
        with target.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        if exc.errno in {errno.ENOSPC, errno.EDQUOT}:
            fix = "Free disk space, or set X07_VM_CACHE_DIR to a folder on a larger disk"
            raise HostError("cannot copy the X07 toolchain", f"{exc.strerror} ({target.parent})", fix) from exc
        raise UsageError(f"cannot read the X07 toolchain {source}", str(exc)[:300], _FIX) from exc


def _checked_size(source: Path, path: Path) -> int:
    """Return the size of a file in the toolchain. Raises UsageError if an image cannot hold the file."""
    info, name = path.lstat(), path.relative_to(source)
    why = ""
    if not str(name).isprintable():
        why = "a file name contains unprintable characters"
    elif stat.S_ISLNK(info.st_mode):
        target = os.path.normpath(name.parent / path.readlink())
        if path.readlink().is_absolute() or target.startswith(".."):
            why = f"{name} is a link out of the folder"
    elif not (stat.S_ISDIR(info.st_mode) or stat.S_ISREG(info.st_mode)):
        why = f"{name} is neither a file nor a folder"
    if why:
        raise UsageError(f"cannot use the X07 toolchain {source}", why, _FIX)
    return info.st_size
