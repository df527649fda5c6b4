"""Pruning: removal of unused images, cache files and records."""

import os
import re
import stat
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final

from x07_sandbox.host import verdicts
from x07_sandbox.host.paths import cache_dir, private_dir, why_not_ours
from x07_sandbox.housekeeping.images import prune_images, prune_saved
from x07_sandbox.housekeeping.pruner import Part, Pruner, PruneReport, entries, sweep_temporaries
from x07_sandbox.housekeeping.records import prune_records

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_VERDICT: Final = re.compile(r"[a-z]+-[0-9a-f]{32}\.json")
_WITH_TEMPORARIES: Final = ("artifacts", verdicts.FOLDER)


def prune(parts: Collection[Part], *, progress: Callable[[str], None], dry_run: bool) -> PruneReport:
    """Remove unused files of the given *parts*. Raises SandboxError if a folder of this tool cannot be used."""
    pruner = Pruner(progress, dry_run=dry_run)
    gone = prune_images(pruner) if "images" in parts else set()
    if {"images", "cache"} & set(parts):
        prune_saved(pruner, gone)
    if "cache" in parts:
        _prune_cache(pruner)
    if "runs" in parts:
        prune_records(pruner)
    return pruner.report()


def _prune_cache(pruner: Pruner) -> None:
    """Remove unused artifacts, and results of tests that have expired."""
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
    for path in entries(cache / verdicts.FOLDER):
        ours = _VERDICT.fullmatch(path.name) and not why_not_ours(path.lstat(), stat.S_ISREG)
        if ours and not verdicts.stored_in(path):
            pruner.remove("verification", path, "it has expired", Path.unlink)
