"""Images that no name leads to any more, bases that no image is made of, and what killed builds left."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from functools import partial
from typing import TYPE_CHECKING

from x07_sandbox.host.locks import file_lock
from x07_sandbox.host.paths import cache_dir
from x07_sandbox.host.variables import text
from x07_sandbox.images.base import read_base, remove_work
from x07_sandbox.images.build import leftovers, remove_from_store
from x07_sandbox.images.store import damaged_images, images_dir, list_images
from x07_sandbox.runs.prune import entries, foreign, sweep_temporaries

if TYPE_CHECKING:
    from pathlib import Path

    from x07_sandbox.images.store import Image
    from x07_sandbox.runs.prune import Broom, Kind

_BASE = re.compile(r"base-[0-9a-f]{32}")


def prune_images(broom: Broom) -> set[str]:
    """Remove what may go of the store; the digests of the images that went, or would go. Raises SandboxError."""
    if not os.path.lexists(cache_dir() / "images"):
        return set()
    folder = images_dir()
    lock = folder / ".lock"
    with file_lock(lock, on_wait=lambda: broom.progress("waiting for a build of an image to end")):
        for left in leftovers():
            broom.remove("leftover", left, "a killed build left it", partial(remove_work, progress=broom.progress))
        sweep_temporaries(folder / "names", broom)
        images = list_images()
        doomed = {image.digest for image in images if not image.name}
        with contextlib.suppress(KeyError):
            doomed.remove(_pinned(images, broom))
        for image in images:
            if image.digest in doomed:
                _remove("image", image.folder, "no name leads to it", broom)
        for damaged in damaged_images():
            place = folder / damaged.digest.removeprefix("sha256:")
            broom.keep("image", place, f"{damaged.problem.why}. {damaged.problem.fix}")
        _prune_bases(folder, {image.manifest.base for image in images if image.digest not in doomed}, broom)
        return doomed


def _pinned(images: list[Image], broom: Broom) -> str:
    """The digest that X07_VM_GUEST_IMAGE_DIGEST names; empty for none."""
    pinned = text("X07_VM_GUEST_IMAGE_DIGEST") or ""
    for image in images:
        if image.digest == pinned and not image.name:
            broom.keep("image", image.folder, "X07_VM_GUEST_IMAGE_DIGEST names it")
    return pinned


def _prune_bases(folder: Path, needed: set[str], broom: Broom) -> None:
    for path in entries(folder):
        if not _BASE.fullmatch(path.name):
            continue
        base = read_base(path)
        if base is None:
            broom.keep(
                "base", path, "it is damaged or of another format; x07 image build makes it anew where it needs it"
            )
        elif base.digest not in needed:
            _remove("base", path, "no image is made of it", broom)


def _remove(kind: Kind, path: Path, why: str, broom: Broom) -> None:
    if problem := foreign(path.lstat(), stat.S_ISDIR):
        broom.keep(kind, path, problem)
    else:
        broom.remove(kind, path, why, partial(remove_from_store, progress=broom.progress))
