"""Pruning: removal of unused images, cache files and records."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

from x07_sandbox.host.paths import cache_dir, private_dir, why_not_ours
from x07_sandbox.housekeeping.images import prune_images, prune_saved
from x07_sandbox.housekeeping.pruner import Pruner, entries, sweep_temporaries
from x07_sandbox.housekeeping.records import prune_records

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from x07_sandbox.housekeeping.pruner import Part, PruneReport

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_WITH_TEMPORARIES: Final = ("artifacts", "libraries", "proofs", "verified")


def prune(parts: Collection[Part], *, progress: Callable[[str], None], dry_run: bool) -> PruneReport:
    """Remove unused files of the given *parts*. Raises SandboxError if a folder of this tool cannot be used."""
    pruner = Pruner(progress, dry_run=dry_run)
    gone: set[str] = set()
    if "images" in parts:
        gone = prune_images(pruner)
    if {"images", "cache"} & set(parts):
        prune_saved(pruner, gone)
    if "cache" in parts:
        _prune_cache(pruner, gone)
    if "runs" in parts:
        prune_records(pruner)
    return pruner.report()


def _prune_cache(pruner: Pruner, gone: set[str]) -> None:
    """Remove unused artifacts, and records that verify missing images or VMs. gone: digests of the removed images."""
    cache = cache_dir()
    if not os.path.lexists(cache):
        return
    private_dir(cache)
    for name in _WITH_TEMPORARIES:
        if os.path.lexists(cache / name):
            sweep_temporaries(private_dir(cache / name), pruner)
    for path in entries(cache / "artifacts"):
        info = path.lstat()
        if _DIGEST.fullmatch(path.name) and (pruner.old(info) or why_not_ours(info, stat.S_ISREG)):
            pruner.remove_own("artifact", path, "it was not used for 7 days", Path.unlink)
    there = {path.name for name in ("images", "templates") for path in entries(cache / name)}
    there -= {digest.removeprefix("sha256:") for digest in gone}
    for path in entries(cache / "verified"):
        known = path.suffix == ".json" and not path.name.startswith(".")
        if known and path.stem not in there and not why_not_ours(path.lstat(), stat.S_ISREG):
            pruner.remove("verification", path, "the image or VM that it verified is missing", Path.unlink)
