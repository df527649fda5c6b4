"""Changes of the user's images, under the store's lock: building, importing, receiving and removing them.

A build reuses an existing image or base if it can. An image is copied to another computer as pieces of its files. The
digest of the image is enough to trust a copy: it covers the manifest, which has the digests of all other files.
"""

import contextlib
import errno
import hashlib
import os
import re
import stat
import tarfile
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import msgspec.structs

from x07_sandbox.errors import Flag, HostError, ImageError, UsageError
from x07_sandbox.host.arch import ARCHES, Arch, arch_named, host_arch, is_foreign
from x07_sandbox.host.locks import file_lock
from x07_sandbox.host.paths import cache_dir, cache_folder, entries
from x07_sandbox.host.variables import text
from x07_sandbox.images import base as bases
from x07_sandbox.images import boot, commands, sources, store, tar, verify
from x07_sandbox.images import pip as pips
from x07_sandbox.images.store import GuestCode, Image
from x07_sandbox.records.pruning import Pruner, sweep_temporaries

WORK_PREFIX = "image-"
X07_TAR = "x07.tar"
WHEELS = "wheels"
SOURCES = "pip-sources"
PROGRAM_FILE: Final = "program.erofs"
_PLACE: Final = "usr/local/lib/x07"
ENTRIES_MAX: Final = 100_000
MAX_BYTES: Final = 2 * 1024**3
_FIX: Final = "Choose a folder with the X07 toolchain for Linux: bin/x07-os-runner and the files it needs"
_PIECE_BYTES: Final = 16 << 20
_MANIFEST: Final = "manifest.json"
_BASE = re.compile(r"base-[0-9a-f]{32}")


def build_image(  # noqa: PLR0913 - one keyword per ingredient
    *,
    name: str = store.DEFAULT,
    include: Sequence[str] | None = None,
    preload: Sequence[str] | None = None,
    pip: Sequence[str] | None = None,
    x07: Path | None = None,
    progress: Callable[[str], None],
    fresh: bool = False,
    code: GuestCode | None = None,
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
    packages = None if include is None else bases.check_packages(include)
    modules = None if preload is None else bases.check_modules(preload)
    requirements = None if pip is None else pips.check_requirements(pip)
    with _locked(progress) as images:
        contents = _contents(name, wanted, packages, modules, progress, keeps_pip=requirements is None)
        with _work_folder(progress) as work:
            builder = _Builder(work, images, progress, fresh=fresh, code=code or store.read_guest_code())
            if x07 is not None:
                progress(f"copying the X07 toolchain {x07}")
                contents = msgspec.structs.replace(contents, x07=pack_toolchain(x07, work / X07_TAR))
            if requirements is not None:
                if contents.pip:
                    progress(f"replacing the Python packages: {', '.join(wheel.name for wheel in contents.pip)}")
                contents = msgspec.structs.replace(contents, pip=builder.download(contents, requirements))
            digest = builder.build(contents)
        store.set_name(name, digest)
    return store.load(digest, name)


def import_image(source: str, name: str, progress: Callable[[str], None]) -> tuple[Image, int]:
    """Make the image called *name*, whose programs see the files of a container image. Raises SandboxError.

    source: see oci.make_root. Return the image, and how many devices and sockets were left out.
    """
    from x07_sandbox.images import oci, store  # few images are imported

    store.check_name(name)
    with _locked(progress) as images:
        with _work_folder(progress) as work:
            program, left_out = oci.make_root(source, work, work / bases.TAR_FILE, progress)
            progress("making the root file system")
            file = work / PROGRAM_FILE
            bases.make_root(work, file, work / bases.TAR_FILE)
            (work / bases.TAR_FILE).unlink()
            contents = bases.Contents(arch=host_arch(), program=program, program_file=file)
            digest = _Builder(work, images, progress, fresh=False, code=store.read_guest_code()).build(contents)
        store.set_name(name, digest)
    return store.load(digest, name), left_out


def pieces_of(image: Image) -> Iterator[tuple[str, bytes]]:
    """Yield the names of the image's files with their content, in pieces; the manifest is first. Raises ImageError."""
    subject = verify.subject_of(image)
    with verify.opened_folder(image.folder, subject) as folder_fd:
        for name in (_MANIFEST, *(part.file for part in image.manifest.files())):
            with verify.opened_file(folder_fd, name, subject) as fd, os.fdopen(fd, "rb", closefd=False) as file:
                while data := file.read(_PIECE_BYTES):
                    yield name, data


def add_image(digest: str, pieces: Iterable[tuple[str, bytes]], progress: Callable[[str], None]) -> Image:
    """Add the image with this digest to the store, unless it is there. Raises ImageError; nothing is then added.

    pieces: those of `pieces_of`. They are not trusted.
    """
    hexes = digest.removeprefix("sha256:")
    with _locked(progress) as images:
        if not (images / hexes).exists():
            with _work_folder(progress) as work:
                made = work / "image"
                made.mkdir(mode=0o700)
                _receive(made, digest, pieces)
                made.rename(images / hexes)
    return store.load(hexes)


def prune_images(pruner: Pruner, in_use: Collection[str]) -> set[str]:
    """Remove unused images, and return their digests. in_use: digests of images that snapshots need.

    Raises SandboxError if the image store cannot be used.
    """
    if not os.path.lexists(cache_dir() / "images"):
        return set()
    folder = store.images_dir()
    with file_lock(folder / ".lock", on_wait=lambda: pruner.progress("waiting for an image build to end")):
        for left in leftovers():
            pruner.remove("leftover", left, "a killed build left it", partial(remove_work, progress=pruner.progress))
        sweep_temporaries(folder / "names", pruner)
        images, doomed = store.list_images(), set()
        remove = partial(_remove_from_store, progress=pruner.progress)
        for image in images:
            if not image.name and image.digest == text("X07_VM_GUEST_IMAGE_DIGEST"):
                pruner.keep("image", image.folder, "X07_VM_GUEST_IMAGE_DIGEST refers to it")
            elif not image.name and image.digest in in_use:
                pruner.keep("image", image.folder, "a paused sandbox or a snapshot needs it")
            elif not image.name:
                doomed.add(image.digest)
                pruner.remove_own("image", image.folder, "it has no name", remove)
        for damaged in store.damaged_images():
            place = folder / damaged.digest.removeprefix("sha256:")
            pruner.keep("image", place, f"{damaged.problem.why}. {damaged.problem.fix}")
        _prune_bases(folder, {image.manifest.base for image in images if image.digest not in doomed}, pruner)
        return doomed


def remove_images(names: Collection[str], pruner: Pruner, in_use: Collection[str]) -> tuple[dict[str, str], set[str]]:
    """Remove the images called *names* and the bases of them alone. Return their digests, and those of removed images.

    An image stays if it has another name, X07_VM_GUEST_IMAGE_DIGEST refers to it, or it is in_use (see `prune_images`).
    Current runs keep the files that they have open. Raises UsageError before any removal if an image does not exist,
    and SandboxError if the store cannot be used.
    """
    folder = store.images_dir()
    with file_lock(folder / ".lock", on_wait=lambda: pruner.progress("waiting for an image build to end")):
        known = store.all_names()
        for name in names:
            if store.check_name(name) not in known:
                here = f"Use one of: {', '.join(sorted(known))}" if known else "See x07 image list"
                raise UsageError(f"cannot remove the image {name!r}", "there is no such image", here)
        removed = {name: known.pop(name) for name in dict.fromkeys(names)}
        for name in removed:
            store.remove_name(name)
        pinned = {one.removeprefix("sha256:") for one in (text("X07_VM_GUEST_IMAGE_DIGEST") or "", *in_use)}
        doomed = set(removed.values()) - set(known.values()) - pinned
        made_of = {image.digest.removeprefix("sha256:"): image.manifest.base for image in store.list_images()}
        unneeded = {made_of[digest] for digest in doomed & made_of.keys()}
        unneeded -= {base for digest, base in made_of.items() if digest not in doomed}
        remove = partial(_remove_from_store, progress=pruner.progress)
        for digest in sorted(doomed):
            if os.path.lexists(folder / digest):
                pruner.remove_own("image", folder / digest, "it has no name any more", remove)
        for path in entries(folder):
            if _BASE.fullmatch(path.name) and (base := bases.read_base(path)) is not None and base.digest in unneeded:
                pruner.remove_own("base", path, "no image uses it", remove)
    return {name: f"sha256:{digest}" for name, digest in removed.items()}, {f"sha256:{digest}" for digest in doomed}


def _contents(
    name: str,
    arch: Arch | None,
    packages: tuple[str, ...] | None,
    modules: tuple[str, ...] | None,
    progress: Callable[[str], None],
    *,
    keeps_pip: bool,
) -> bases.Contents:
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
        return bases.Contents(arch=_architecture(name, arch), include=packages or (), preload=modules or ())
    old = image.manifest
    kept = {
        "packages": old.include if packages is None else [],
        "preloaded modules": old.preload if modules is None else [],
        "Python packages": [wheel.name for wheel in old.pip] if keeps_pip else [],
    }
    for kind, names in kept.items():
        if names:
            progress(f"keeping the {kind}: {', '.join(names)}")
    return bases.Contents(
        arch=_architecture(name, arch, arch_named(old.arch)),
        include=bases.check_packages(old.include) if packages is None else packages,
        preload=bases.check_modules(old.preload) if modules is None else modules,
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
        raise UsageError(what, f"this host is {host_arch().deb}, and jobs use this image if they name no other", fix)
    return arch


class _Builder:
    """One build. work: its private folder. images: the store's folder. fresh: do not reuse bases."""

    def __init__(
        self, work: Path, images: Path, progress: Callable[[str], None], *, fresh: bool, code: GuestCode
    ) -> None:
        self._work = work
        self._images = images
        self._progress = progress
        self._fresh = fresh
        self._code = code

    def build(self, contents: bases.Contents) -> str:
        """Build the image, unless it exists, and return its digest (hex). Raises SandboxError."""
        base = None if self._fresh else bases.read_base(self._base_folder(contents))
        if base is not None and (digest := self._existing(base, contents)):
            return digest
        commands.require_execution(contents.arch)
        folder, base = self._base(contents)
        boot_work, made = self._work / "boot", self._work / "image"
        boot_work.mkdir(mode=0o700)
        made.mkdir(mode=0o700)
        root, modules = folder / base.root.file, base.modules(folder)
        archive, filters = boot.make_initrd(boot_work, root, modules, contents.arch, self._code, self._progress)
        for part in (base.kernel, base.root, base.scratch):
            os.link(folder / part.file, made / part.file)
        program = None
        if contents.program_file is not None:
            os.link(contents.program_file, made / PROGRAM_FILE)
            program = bases.part_of(made, PROGRAM_FILE)
        initrd = bases.put(made, "initrd.cpio", archive)
        image = store.sealed(
            store.Manifest(
                schema_version=store.SCHEMA,
                digest=store.NO_DIGEST,
                recipe=bases.RECIPE,
                arch=contents.arch.name,
                suite=contents.suite,
                include=list(contents.include),
                preload=list(contents.preload),
                x07=contents.x07,
                pip=list(contents.pip),
                base=base.digest,
                guest_code=self._code.digest,
                kernel_release=base.kernel_release,
                parts=store.Parts(
                    kernel=base.kernel, initrd=initrd, root=base.root, scratch=base.scratch, program=program
                ),
                scratch_disk=base.scratch_disk,
                packages=base.packages,
                # Copies of the filters in the initramfs, for inspection.
                filters={
                    name.removesuffix(boot.FILTER_SUFFIX): bases.put(made, name, data) for name, data in filters.items()
                },
                program=contents.program,
            )
        )
        bases.put(made, _MANIFEST, store.encode_manifest(image))
        target = self._images / image.digest.removeprefix("sha256:")
        if target.exists():  # damaged, since it was not reused
            target.rename(self._work / "old-image")
        made.rename(target)
        return target.name

    def download(
        self, contents: bases.Contents, lines: tuple[str, ...], *, deps: bool = True
    ) -> tuple[store.Wheel, ...]:
        """Download the wheels that satisfy *lines* and fit the image. Raises SandboxError."""
        if not lines:
            return ()
        folder = self._work / SOURCES
        folder.mkdir(mode=0o700)
        file = sources.write_sources(folder, contents.suite, contents.arch.deb, lambda _note: None)
        plain = msgspec.structs.replace(contents, x07="", pip=())
        base = bases.read_base(self._base_folder(plain))
        if base is not None:
            python = _python(base, contents.arch)
        else:
            python = pips.guest_python(sources.versions(file, ("python3", "libc6")), contents.arch.name)
        return pips.download(self._work / WHEELS, lines, python, self._progress, sources_file=file, deps=deps)

    def _base_folder(self, contents: bases.Contents) -> Path:
        return self._images / f"base-{contents.base_key}"

    def _existing(self, base: bases.Base, contents: bases.Contents) -> str:
        """Return the digest (hex) of an intact image with these contents, or "" if there is none."""
        wanted = base.digest, self._code.digest, list(contents.preload), contents.program
        for image in store.list_images():
            made = image.manifest
            if (made.base, made.guest_code, made.preload, made.program) == wanted:
                if problems := verify.verify_image(image, use_record=True):
                    self._progress(f"{problems[0]}: rebuilding the image")
                    return ""  # images with the same contents share a folder
                return image.digest.removeprefix("sha256:")
        return ""

    def _base(self, contents: bases.Contents) -> tuple[Path, bases.Base]:
        """Return the image's base, after its folder. Make the base if it is missing or damaged. Raises SandboxError."""
        folder = self._base_folder(contents)
        base = None if self._fresh else bases.read_base(folder)
        if base is not None:
            try:
                bases.check_base(folder, base)
            except ImageError as exc:
                self._progress(f"{exc.what} ({exc.why}); downloading it again")
            else:
                return folder, base
        made = self._new_base(contents)
        if folder.exists():  # images have links to its files
            folder.rename(self._work / f"old-{folder.name}")
        made.rename(folder)
        base = bases.read_base(folder)
        assert base is not None
        return folder, base

    def _new_base(self, contents: bases.Contents) -> Path:
        """Make a base in the work folder: from Debian packages, or by adding the X07 toolchain or wheels to a base."""
        work = self._work
        if contents.pip:
            return self._with_wheels(contents)
        if not contents.x07:
            return bases.make_base(work, contents, self._progress)
        if not (work / X07_TAR).exists():
            why = "this host has no copy of the image's X07 toolchain"
            raise ImageError("cannot rebuild the image", why, "Add --x07-toolchain DIR")
        below, base = self._base(msgspec.structs.replace(contents, x07=""))
        self._progress("adding the X07 toolchain")
        return bases.add_layer(work, below, base, work / X07_TAR, x07=contents.x07)

    def _with_wheels(self, contents: bases.Contents) -> Path:
        work = self._work
        without = msgspec.structs.replace(contents, pip=())
        below, base = self._base(without)
        if not (work / WHEELS).exists():  # a rebuild: download the same wheels again
            downloaded = self.download(without, pips.pinned(contents.pip), deps=False)
            if set(downloaded) != set(contents.pip):
                why = "the package index has different files now"
                raise ImageError("cannot rebuild the image", why, "Request its Python packages again: --pip NAME,...")
        self._progress("unpacking the root file system")
        commands.check_space(work, boot.UNPACKED_MAX * base.root.bytes)
        root = commands.unpack_root(work, below / base.root.file)
        self._progress("adding the Python packages")
        python = _python(base, contents.arch)
        tar = pips.make_layer(work, sorted((work / WHEELS).iterdir()), root, python.version)
        commands.remove_tree(root)
        return bases.add_layer(work, below, base, tar)


def _python(base: bases.Base, arch: Arch) -> pips.GuestPython:
    return pips.guest_python({package.name: package.version for package in base.packages}, arch.name)


@contextlib.contextmanager
def _locked(progress: Callable[[str], None]) -> Iterator[Path]:
    """Lock the store, remove what killed builds left, and yield the store's folder."""
    with file_lock(store.images_dir() / ".lock", on_wait=lambda: progress("waiting for another image build")):
        for folder in leftovers():
            remove_work(folder, progress)
        yield store.images_dir()


@contextlib.contextmanager
def _work_folder(progress: Callable[[str], None]) -> Iterator[Path]:
    """Yield the folder of a build, and remove it at the end; the caller must hold the store's lock."""
    work = Path(tempfile.mkdtemp(prefix=WORK_PREFIX, dir=cache_folder("tmp")))
    try:
        yield work
    finally:
        remove_work(work, progress)


def leftovers() -> list[Path]:
    """Return the folders of killed builds; the caller must hold the store's lock."""
    return sorted(cache_folder("tmp").glob(f"{WORK_PREFIX}*"))


def remove_work(work: Path, progress: Callable[[str], None]) -> None:
    """Remove the folder of a finished or killed build, once all processes of that build have ended."""
    with file_lock(work / bases.TAR_FILE, on_wait=lambda: progress("waiting for the processes of a killed build")):
        tree = work / bases.TREE
        if tree.exists() and os.geteuid() != 0:
            # It belongs to subordinate uids.
            argv = [*commands.own_namespaces(), commands.tool("rm"), "-rf", "--one-file-system", str(tree)]
            commands.run(argv, cwd=work, timeout_s=120)
        commands.remove_tree(work)


def _remove_from_store(folder: Path, progress: Callable[[str], None]) -> None:
    """Remove an image or a base atomically; the caller must hold the store's lock. Raises OSError, SandboxError."""
    with _work_folder(progress) as work:
        folder.rename(work / "removed")


def _receive(folder: Path, digest: str, pieces: Iterable[tuple[str, bytes]]) -> None:
    """Write the pieces into the folder, and compare the files with the digest. Raises ImageError."""
    left = iter(pieces)
    name, data = next(left, ("", b""))
    if name != _MANIFEST:
        raise _bad_copy(digest, "its first file is not the manifest")
    described = store.decode_manifest(data, f"guest image {digest[:80]}")
    if described.digest != digest:
        raise _bad_copy(digest, "its manifest belongs to another image")
    bases.put(folder, _MANIFEST, data)
    parts = {part.file: part for part in described.files()}
    sizes = dict.fromkeys(parts, 0)
    for name, data in left:
        if name not in parts or sizes[name] + len(data) > parts[name].bytes:
            raise _bad_copy(digest, f"{name[:80]!r} is not in the manifest, or too large")
        sizes[name] += len(data)
        with (folder / name).open("ab") as file:
            file.write(data)
    for name, part in parts.items():
        if sizes[name] != part.bytes or bases.part_of(folder, name) != part:
            raise _bad_copy(digest, f"{name} is incomplete or damaged")


def _bad_copy(digest: str, why: str) -> ImageError:
    return ImageError(f"cannot copy guest image {digest[:80]}", why, "Copy it again")


def _prune_bases(folder: Path, needed: set[str], pruner: Pruner) -> None:
    for path in entries(folder):
        if not _BASE.fullmatch(path.name):
            continue
        base = bases.read_base(path)
        if base is None:
            pruner.keep("base", path, "it is damaged or has an unknown format. x07 image build replaces it if needed")
        elif base.digest not in needed:
            remove = partial(_remove_from_store, progress=pruner.progress)
            pruner.remove_own("base", path, "no image uses it", remove)


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
