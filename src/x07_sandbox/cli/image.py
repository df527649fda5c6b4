"""`x07 image`: build, list, load, remove, inspect and verify guest images."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from pathlib import Path
from shlex import join
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from x07_sandbox.backends.base import NOT_IMPORTED, SLOW_IMPORT
from x07_sandbox.cli.console import Progress, say, show, size
from x07_sandbox.cli.json_output import deliver, print_document
from x07_sandbox.cli.parser import add_document_flags, folder_path, inner_verb, nonempty, switch
from x07_sandbox.errors import SandboxError, UsageError
from x07_sandbox.host.arch import arch_named, is_foreign
from x07_sandbox.host.linux import require_linux
from x07_sandbox.images.build import build_image
from x07_sandbox.images.presets import PRESETS, preset_named
from x07_sandbox.images.store import (
    DEFAULT,
    build_command,
    damaged_images,
    find_image,
    image_is_current,
    list_images,
    named,
    remove_name,
    repair_hint,
    set_name,
)
from x07_sandbox.images.verify import verify_image
from x07_sandbox.reports.commands import (
    BuildReport,
    ImageRow,
    ListReport,
    LoadReport,
    PresetRow,
    PresetsReport,
    RemovedName,
    RemoveReport,
    VerifyReport,
)
from x07_sandbox.sessions.saving import prepare_clones

if TYPE_CHECKING:
    from x07_sandbox.images.store import DamagedImage, Image, ProgramRoot

_SHOWN: Final = 5
_PRELOAD_FIXES: Final = {
    NOT_IMPORTED: "Add its package (--include or --pip), or remove it from --preload",
    SLOW_IMPORT: "Remove the slow module from --preload, or try again when this host is less busy",
}
_EXAMPLES: Final = """examples:
  x07 image build                                build or update the image named default
  x07 image build --name science --include python3-numpy,python3-pandas
  x07 image build --preset agent                 build the image named agent, with git, curl, node, ...
  x07 image build --name science --pip 'numpy,pandas>=2' --preload numpy,pandas
  x07 image build --name science                 update or repair it, with the same packages
  x07 image build --name x07 --x07-toolchain x07-linux
  x07 image build --arch arm64                   build the image named arm64, for emulated ARM programs
  x07 image load                                 load an image into podman and docker
  x07 image rm science
  x07 image verify                               compare every byte of an image with its manifest
"""
_IMPORT: Final = """Programs, commands and sandboxes that use the image see its files. The agent of x07 stays in an
image of its own, so the container image needs no shell and no Python. Its environment and working folder apply.
Programs run as an ordinary user, or as root with --guest-root, whatever user the image names. They are built in x07's
own image.

examples:
  x07 image import docker://docker.io/library/alpine:3.22 --name alpine
  podman save --format oci-archive -o app.tar app && x07 image import app.tar
  x07 exec --image alpine -- /bin/busybox
"""
_LOAD: Final = """Load an image into podman and docker, for --backend podman|docker. The image has the same id in both,
and on every host. To accept only this image, set X07_VM_GUEST_IMAGE_DIGEST to this id."""
_RM: Final = """Remove images by name, with their saved VMs and the packages that no other image needs. If an image
also has another name, x07 removes only the given name. Running programs are not affected."""


def add_image(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `x07 image`."""
    parser.description = "Manage guest images. x07 builds them from Debian packages, with the APT sources of this host."
    parser.epilog = _EXAMPLES
    inner = parser.add_subparsers(metavar="ACTION", required=True)
    build = inner_verb(inner, "build", "build, update or repair an image")
    build.add_argument("--name", help="name of the image (default: default, or the value of --preset or --arch)")
    doc = "build an image with the packages of this preset, and with those of the options below"
    build.add_argument("--preset", metavar="NAME", help=doc)
    switch(build, "--list-presets", "list the presets and their packages, and build nothing")
    doc = "architecture, such as arm64 (default: that of the image, or of this host); another one than this host's is"
    build.add_argument("--arch", metavar="ARCH", help=f"{doc} emulated, slowly, and only by the QEMU backend")
    for flag, metavar, what, none in (
        ("include", "PKG,...", "extra Debian packages to install", "remove the extra Debian packages from the image"),
        (
            "pip",
            "PKG,...",
            "Python packages to install from wheels, or file:PATH for a requirements file",
            "remove the Python packages that --pip added",
        ),
        (
            "preload",
            "MODULE,...",
            "Python modules to import before programs start",
            "import no modules before programs start",
        ),
    ):
        group = build.add_mutually_exclusive_group()
        doc = f"{what} (default: those that the image already has)"
        group.add_argument(f"--{flag}", action="append", metavar=metavar, help=doc)
        switch(group, f"--no-{flag}", none)
    doc = "folder with a Linux build of the X07 language (bin/x07-os-runner and what it needs); later builds reuse it"
    build.add_argument("--x07-toolchain", type=folder_path, metavar="DIR", help=doc)
    switch(build, "--fresh", "download all packages again, to get newer versions")
    imported = inner_verb(inner, "import", "make an image whose programs see the files of a container image")
    imported.epilog = _IMPORT
    doc = "OCI layout (a folder or an archive), archive of docker save, or docker://REFERENCE"
    imported.add_argument("source", metavar="SOURCE", type=nonempty, help=doc)
    imported.add_argument("--name", metavar="NAME", help="name of the image (default: from SOURCE)")
    listing = inner_verb(inner, "list", "list images")
    load = inner.add_parser("load", help="load an image into podman and docker", description=_LOAD)
    load.add_argument(
        "engines", nargs="*", metavar="ENGINE", help="podman or docker (default: those that are installed)"
    )
    load.add_argument("--image", metavar="NAME|DIGEST", help="which image (default: the one named default)")
    load.add_argument(
        "--tag",
        metavar="NAME:TAG",
        help="name of the image in podman and docker (default: the name that the backends look for)",
    )
    load.add_argument("--archive", type=Path, metavar="FILE", help="also write the image to this archive")
    remove = inner.add_parser("rm", help="remove images by name", description=_RM)
    remove.add_argument("names", nargs="+", metavar="NAME", help="name of an image, as x07 image list shows it")
    inspect = inner_verb(inner, "inspect", "print the manifest of an image")
    verify = inner_verb(inner, "verify", "compare every byte of an image with its manifest")
    for sub, action in (
        *((build, _build), (imported, _import), (listing, _list), (load, _load), (remove, _remove)),
        *((inspect, _inspect), (verify, _verify)),
    ):
        if sub in {inspect, verify}:
            sub.add_argument(
                "image", nargs="?", metavar="NAME|DIGEST", help="which image (default: the one named default)"
            )
        add_document_flags(sub)
        sub.set_defaults(carry_out=action)


def _import(options: argparse.Namespace) -> int:
    from x07_sandbox.images.build import import_image

    name = options.name or _name_from(options.source)
    progress = Progress(f"image {name}")
    image, left_out = import_image(options.source, name, progress)
    with contextlib.suppress(SandboxError):  # later runs save the VMs, or say why they cannot
        prepare_clones(image, progress)
    progress.done(f"ready: {image.digest}")
    program = image.manifest.program
    if left_out:
        say(f"left out: {left_out} devices and sockets")
    if program is not None and program.user not in {"", "65532"}:
        what = "root only with --guest-root" if program.user.partition(":")[0] in {"0", "root"} else "uid 65532"
        say(f"the image's user is {program.user}; its programs run as {what}")
    print_document(BuildReport(name=name, digest=image.digest), options)
    return 0


def _name_from(source: str) -> str:
    """Return a name for an image: the last part of its reference or path, without tag, digest and suffix."""
    last = source.rstrip("/").rpartition("/")[2].partition("@")[0].partition(":")[0]
    name = re.sub(r"[^a-z0-9._-]+", "-", last.removesuffix(".tar").lower()).strip("-._")
    if not name or name == "default":
        raise UsageError("wrong usage", f"no name can be made from {source}", "Add --name NAME")
    return name


def build_with_progress(  # noqa: PLR0913 - one argument per ingredient
    name: str,
    include: list[str] | None,
    preload: list[str] | None = None,
    *,
    pip: list[str] | None = None,
    x07: Path | None = None,
    fresh: bool = False,
    arch: str | None = None,
) -> Image:
    """Build an image. include, preload, pip: None takes the list from the old image *name*. Raises SandboxError."""
    progress = Progress(f"image {name}")
    before = None
    with contextlib.suppress(SandboxError):  # no image with this name, or an unreadable one
        before = named(name)
    image = build_image(
        name=name, include=include, preload=preload, pip=pip, x07=x07, progress=progress, fresh=fresh, arch=arch
    )
    try:
        prepare_clones(image, progress)
    except SandboxError as exc:
        if image.manifest.preload:  # a module is missing or slow, so no run would find them imported
            fix = _PRELOAD_FIXES.get(exc.code) or f"Try again with fewer modules. {exc.fix}"
            if before is None:
                remove_name(name)
            elif before.digest != image.digest:
                set_name(name, before.digest.removeprefix("sha256:"))
                fix += f"; the image {name!r} was not changed"
            what = exc.what if exc.code == NOT_IMPORTED else "cannot preload modules"
            raise type(exc)(what, exc.why, fix, code=exc.code) from exc
        # The image can be used without them.
        progress.done(f"no VM was saved with this image ({exc.what}: {exc.why}). {exc.fix}{exc.stop}")
    progress.done(f"ready: {image.digest}")
    return image


def _build(options: argparse.Namespace) -> int:
    if options.list_presets:
        return _list_presets(options)
    include = [] if options.no_include else _names(options.include)
    preload = [] if options.no_preload else _names(options.preload)
    pip = [] if options.no_pip else _requirements(options.pip)
    if options.preset is not None:
        preset = preset_named(options.preset)
        include, pip = [*preset.include, *(include or ())], [*preset.pip, *(pip or ())]
        preload = [*preset.preload, *(preload or ())]
    arch = None if options.arch is None else arch_named(options.arch)
    name = options.name or options.preset or (arch.deb if arch is not None and is_foreign(arch) else DEFAULT)
    image = build_with_progress(
        name, include, preload, pip=pip, x07=options.x07_toolchain, fresh=options.fresh, arch=options.arch
    )
    print_document(BuildReport(name=image.name, digest=image.digest), options)
    return 0


def _list_presets(options: argparse.Namespace) -> int:
    rows = tuple(PresetRow(**preset._asdict()) for preset in PRESETS.values())
    if not print_document(PresetsReport(presets=rows), options):
        for row in rows:
            show(f"{row.name:<8} {row.about}")
            lists = {"include": row.include, "pip": row.pip, "preload": row.preload}
            for flag, names in lists.items():
                if names:
                    show(f"{'':<8} --{flag} {','.join(names)}")
    return 0


def _load(options: argparse.Namespace) -> int:
    from x07_sandbox.backends.engines import CLIENTS, DEFAULT_REFERENCE, check_reference, load
    from x07_sandbox.sessions.prepare import current_image

    if unknown := sorted(set(options.engines) - set(CLIENTS)):
        raise UsageError(
            f"cannot load an image into {unknown[0]!r}", "it is no container engine", "Use podman or docker"
        )
    reference = check_reference(options.tag or DEFAULT_REFERENCE)
    image = current_image(find_image(options.image or "default"))
    if image.manifest.program is not None:
        what = f"cannot load {options.image} into a container engine"
        raise UsageError(what, "it was imported from a container image", "Load an image of x07 image build")
    progress = Progress(f"image {reference}")
    digest, engines = load(image, reference, options.engines, progress, options.archive)
    progress.done(f"ready: {digest}")
    archive = None if options.archive is None else str(options.archive)
    report = LoadReport(reference=reference, digest=digest, image=image.digest, engines=engines, archive=archive)
    if not print_document(report, options):
        show(f"{reference} {digest} in {', '.join(filter(None, (*engines, archive)))}")
    return 0


def _names(chunks: list[str] | None) -> list[str] | None:
    """Split the values of an option that takes comma-separated names. Return None if the option was not given."""
    return None if chunks is None else [name.strip() for chunk in chunks for name in chunk.split(",") if name.strip()]


def _requirements(chunks: list[str] | None) -> list[str] | None:
    """Split the values of --pip into requirements. Return None if --pip was not given."""
    from x07_sandbox.images.pip import split_list

    return None if chunks is None else [each for chunk in chunks for each in split_list(chunk)]


def _list(options: argparse.Namespace) -> int:
    require_linux()  # the sizes of saved VMs need all backends
    from x07_sandbox.library.cleanup import image_sizes

    own, saved, total = image_sizes()
    rows = tuple(
        replace(row, bytes=own.get(row.digest, 0), saved_bytes=saved.get(row.digest, 0))
        for row in (
            *map(_row, list_images()),
            *(_bare_row(one, one.problem.why, one.problem.fix) for one in damaged_images()),
        )
    )
    if print_document(ListReport(images=rows, bytes=total), options):
        return 0
    if not rows:
        say("no images yet. To build one: x07 image build")
    for row in rows:
        note = "" if row.problem is None else f"  ({row.problem}. {row.fix}.)"
        foreign = f"  {row.arch}" if row.arch not in {None, os.uname().machine} else ""
        packages = foreign + _some("include", row.include) + _some("pip", row.pip) + _about(row.program)
        taken = f"{size(row.bytes):>9} + {size(row.saved_bytes)} of saved VMs"
        show(f"{row.name or '-':<16} {row.digest}  {taken}  {row.suite or 'damaged'}{packages}{note}")
    if rows:
        rest = total - sum({row.digest: row.bytes + row.saved_bytes for row in rows}.values())
        show(f"{'all':<16} {size(total)}, of which {size(rest)} are shared by images or belong to none")
    return 0


def _about(program: ProgramRoot | None) -> str:
    """Return what a container image says about its programs, in one line."""
    if program is None:
        return ""
    facts = {"user": program.user, "folder": program.workdir, "command": join([*program.entrypoint, *program.cmd])}
    said = "".join(f", {name} {value}" for name, value in facts.items() if value)
    return f"  imported: {program.oci[:19]}{said}"


def _some(flag: str, names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"  {flag}: {', '.join(names[:_SHOWN])}{more}" if names else ""


def _row(image: Image) -> ImageRow:
    problem = fix = None
    if not (current := image_is_current(image)):
        problem = "built by another version of x07-sandbox"
        fix = f"Run {build_command(image.name)}"
        if not image.name:
            fix = "Remove the image with x07 prune: without a name, it cannot be updated"
    return replace(
        _bare_row(image, problem, fix),
        suite=image.manifest.suite,
        arch=image.manifest.arch,
        include=tuple(image.manifest.include),
        pip=tuple(f"{wheel.name}=={wheel.version}" for wheel in image.manifest.pip),
        program=image.manifest.program,
        current=current,
    )


def _bare_row(image: Image | DamagedImage, problem: str | None, fix: str | None) -> ImageRow:
    """Return the row of an image whose manifest is not known."""
    return ImageRow(
        name=image.name,
        digest=image.digest,
        suite=None,
        arch=None,
        include=(),
        pip=(),
        program=None,
        current=False,
        problem=problem,
        fix=fix,
    )


def _remove(options: argparse.Namespace) -> int:
    from x07_sandbox.images.build import remove_images
    from x07_sandbox.library.cleanup import images_in_use, prune_saved
    from x07_sandbox.records.pruning import Pruner

    pruner = Pruner(Progress("image rm"), dry_run=False)
    removed, gone = remove_images(options.names, pruner, images_in_use())
    prune_saved(pruner, gone)
    done = pruner.report()
    report = RemoveReport(
        images=tuple(RemovedName(name=name, digest=digest) for name, digest in removed.items()),
        bytes=done.bytes,
        kept=tuple(f"{kept.path}: {kept.why}" for kept in done.kept if kept.failed),
    )
    if not print_document(report, options):
        show(f"removed {', '.join(removed)} ({size(done.bytes)})")
        for kept in report.kept:
            say(f"not removed: {kept}")
    return 1 if report.kept else 0


def _inspect(options: argparse.Namespace) -> int:
    image = find_image(options.image)
    deliver((image.folder / "manifest.json").read_bytes(), options, always=True)
    return 0


def _verify(options: argparse.Namespace) -> int:
    image = find_image(options.image)
    problems = verify_image(image)
    fix = repair_hint(image) if problems else None
    report = VerifyReport(digest=image.digest, good=not problems, problems=tuple(problems), fix=fix)
    if not print_document(report, options):
        for problem in problems:
            say(problem)
        if problems:
            say(f"the image is damaged. {fix}.")
        else:
            show(f"{image.digest} matches its manifest")
    return 1 if problems else 0
