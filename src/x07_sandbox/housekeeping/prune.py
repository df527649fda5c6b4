"""Remove what may go of each part of state and cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from x07_sandbox.housekeeping.cache import prune_cache, prune_saved
from x07_sandbox.housekeeping.images import prune_images
from x07_sandbox.housekeeping.pruner import Pruner
from x07_sandbox.housekeeping.records import prune_records

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from x07_sandbox.housekeeping.pruner import Part, PruneReport


def prune(parts: Collection[Part], *, progress: Callable[[str], None], dry_run: bool) -> PruneReport:
    """Remove what may go of *parts*. Raises SandboxError if a folder of ours cannot be used at all."""
    pruner = Pruner(progress, dry_run=dry_run)
    gone: set[str] = set()
    if "images" in parts:
        gone = prune_images(pruner)
    if {"images", "cache"} & set(parts):
        prune_saved(pruner, gone)
    if "cache" in parts:
        prune_cache(pruner, gone)
    if "runs" in parts:
        prune_records(pruner)
    return pruner.report()
