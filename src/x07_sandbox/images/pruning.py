"""Removal of images without a name, of bases (images/base) without an image, and of incomplete builds."""

import os
import re
from collections.abc import Collection
from functools import partial
from pathlib import Path

from x07_sandbox.errors import UsageError
from x07_sandbox.host.locks import file_lock
from x07_sandbox.host.paths import cache_dir, entries
from x07_sandbox.host.variables import text
from x07_sandbox.images.base import read_base, remove_work
from x07_sandbox.images.build import leftovers, remove_from_store
from x07_sandbox.images.store import all_names, check_name, damaged_images, images_dir, list_images, remove_name
from x07_sandbox.records.pruning import Pruner, sweep_temporaries

_BASE = re.compile(r"base-[0-9a-f]{32}")


def prune_images(pruner: Pruner) -> set[str]:
    """Remove unused images, and return their digests. Raises SandboxError if the image store cannot be used."""
    if not os.path.lexists(cache_dir() / "images"):
        return set()
    folder = images_dir()
    with file_lock(folder / ".lock", on_wait=lambda: pruner.progress("waiting for an image build to end")):
        for left in leftovers():
            pruner.remove("leftover", left, "a killed build left it", partial(remove_work, progress=pruner.progress))
        sweep_temporaries(folder / "names", pruner)
        images, doomed = list_images(), set()
        remove = partial(remove_from_store, progress=pruner.progress)
        for image in images:
            if not image.name and image.digest == text("X07_VM_GUEST_IMAGE_DIGEST"):
                pruner.keep("image", image.folder, "X07_VM_GUEST_IMAGE_DIGEST refers to it")
            elif not image.name:
                doomed.add(image.digest)
                pruner.remove_own("image", image.folder, "it has no name", remove)
        for damaged in damaged_images():
            place = folder / damaged.digest.removeprefix("sha256:")
            pruner.keep("image", place, f"{damaged.problem.why}. {damaged.problem.fix}")
        _prune_bases(folder, {image.manifest.base for image in images if image.digest not in doomed}, pruner)
        return doomed


def _prune_bases(folder: Path, needed: set[str], pruner: Pruner) -> None:
    for path in entries(folder):
        if not _BASE.fullmatch(path.name):
            continue
        base = read_base(path)
        if base is None:
            pruner.keep("base", path, "it is damaged or has an unknown format. x07 image build replaces it if needed")
        elif base.digest not in needed:
            remove = partial(remove_from_store, progress=pruner.progress)
            pruner.remove_own("base", path, "no image uses it", remove)


def remove_images(names: Collection[str], pruner: Pruner) -> tuple[dict[str, str], set[str]]:
    """Remove the images called *names* and the bases of them alone. Return their digests, and those of removed images.

    An image stays if it has another name or X07_VM_GUEST_IMAGE_DIGEST refers to it. Current runs keep the files that
    they have open. Raises UsageError before any removal if an image does not exist, and SandboxError if the store
    cannot be used.
    """
    folder = images_dir()
    with file_lock(folder / ".lock", on_wait=lambda: pruner.progress("waiting for an image build to end")):
        known = all_names()
        for name in names:
            if check_name(name) not in known:
                here = f"Use one of: {', '.join(sorted(known))}" if known else "See x07 image list"
                raise UsageError(f"cannot remove the image {name!r}", "there is no such image", here)
        removed = {name: known.pop(name) for name in dict.fromkeys(names)}
        for name in removed:
            remove_name(name)
        pinned = (text("X07_VM_GUEST_IMAGE_DIGEST") or "").removeprefix("sha256:")
        doomed = set(removed.values()) - set(known.values()) - {pinned}
        made_of = {image.digest.removeprefix("sha256:"): image.manifest.base for image in list_images()}
        unneeded = {made_of[digest] for digest in doomed & made_of.keys()}
        unneeded -= {base for digest, base in made_of.items() if digest not in doomed}
        remove = partial(remove_from_store, progress=pruner.progress)
        for digest in sorted(doomed):
            if os.path.lexists(folder / digest):
                pruner.remove_own("image", folder / digest, "it has no name any more", remove)
        for path in entries(folder):
            if _BASE.fullmatch(path.name) and (base := read_base(path)) is not None and base.digest in unneeded:
                pruner.remove_own("base", path, "no image uses it", remove)
    return {name: f"sha256:{digest}" for name, digest in removed.items()}, {f"sha256:{digest}" for digest in doomed}
