"""Saved machines whose image is gone, what was built and has not been used for long, and what killed processes left."""

from __future__ import annotations

import os
import re
import stat
from typing import TYPE_CHECKING, Final

from x07_sandbox.backends.registry import built, create
from x07_sandbox.host.paths import cache_dir, private_dir, why_not_ours
from x07_sandbox.housekeeping.pruner import entries, sweep_temporaries, unlink
from x07_sandbox.images.store import list_images

if TYPE_CHECKING:
    from x07_sandbox.housekeeping.pruner import Pruner

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_MESSY: Final = ("artifacts", "libraries", "proofs", "verified")  # where files are written beside their place


def prune_saved(pruner: Pruner, gone: set[str]) -> None:
    """Remove saved machines as making another does. gone: digests of images that go. Raises SandboxError."""
    if not os.path.lexists(cache_dir()):
        return
    images = {image.digest for image in list_images()} - gone
    for backend in map(create, built()):
        if backend.cloning is not None:
            backend.cloning.prune(pruner, images)


def prune_cache(pruner: Pruner, gone: set[str]) -> None:
    """Remove what was not used for long, and records of what is not there. Raises SandboxError."""
    cache = cache_dir()
    if not os.path.lexists(cache):
        return
    private_dir(cache)
    for name in _MESSY:
        if os.path.lexists(cache / name):
            sweep_temporaries(private_dir(cache / name), pruner)
    for path in entries(cache / "artifacts"):
        info = path.lstat()
        if _DIGEST.fullmatch(path.name) and (pruner.old(info) or why_not_ours(info, stat.S_ISREG)):
            pruner.remove_own("artifact", path, "it was not used for 7 days", unlink)
    # What was hashed once and is not there: the record says nothing any more.
    there = {path.name for name in ("images", "templates") for path in entries(cache / name)}
    there -= {digest.removeprefix("sha256:") for digest in gone}
    for path in entries(cache / "verified"):
        known = path.suffix == ".json" and not path.name.startswith(".")
        if known and path.stem not in there and not why_not_ours(path.lstat(), stat.S_ISREG):
            pruner.remove("verification", path, "what it tells of is gone", unlink)
