"""Pruning: removal of unused images, cache files and records, and the disk space that it would free (`x07 df`)."""

import os
import re
import stat
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final, Literal

import msgspec

from x07_sandbox.host import settings, verdicts
from x07_sandbox.host.paths import cache_dir, private_dir, state_dir, why_not_ours
from x07_sandbox.housekeeping.images import prune_images, prune_saved
from x07_sandbox.housekeeping.pruner import (
    PARTS,
    Part,
    Pruner,
    PruneReport,
    entries,
    sizes_by_file,
    sweep_temporaries,
)
from x07_sandbox.housekeeping.records import prune_records
from x07_sandbox.images.base import remove_tree
from x07_sandbox.sessions.folder import runs_dir

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_VERDICT: Final = re.compile(r"[a-z-]+-[0-9a-f]{32}\.json")
_UNPACKED: Final = "gvisor"  # unpacked files of images (backends/gvisor)
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
        prune_records(pruner, unapplied=True)
    return pruner.report()


def _prune_cache(pruner: Pruner) -> None:
    """Remove unused artifacts, unpacked files of removed images, and results of tests that have expired."""
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
    _prune_unpacked(pruner, cache)
    for path in entries(cache / verdicts.FOLDER):
        ours = _VERDICT.fullmatch(path.name) and not why_not_ours(path.lstat(), stat.S_ISREG)
        if ours and not verdicts.stored_in(path):
            pruner.remove("verification", path, "it has expired", Path.unlink)


def _prune_unpacked(pruner: Pruner, cache: Path) -> None:
    for path in entries(cache / _UNPACKED):
        info = path.lstat()
        if path.name.startswith(".new-") and pruner.old(info, settings.DAY_S):
            pruner.remove_own("leftover", path, "a killed process left it incomplete", remove_tree)
        elif _DIGEST.fullmatch(path.name) and pruner.old(info) and not os.path.lexists(cache / "images" / path.name):
            pruner.remove_own("base", path, "its image was removed", remove_tree)


Name = Literal["images", "templates", "cache", "runs", "records"]


class PartUsage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One part of state and cache. bytes: its size on disk. prunable_bytes: the bytes that `x07 prune` would free."""

    name: Name
    path: str
    files: int
    bytes: int
    prunable_bytes: int


class DfReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The output of `x07 df --json`. bytes, prunable_bytes: the sums over all parts."""

    schema_version: Literal["x07.sandbox.df@0.1.0"] = "x07.sandbox.df@0.1.0"
    parts: tuple[PartUsage, ...]
    bytes: int
    prunable_bytes: int


def disk_usage(progress: Callable[[str], None]) -> DfReport:
    """Measure each part of state and cache. Raises SandboxError if a folder of this tool cannot be used."""
    places: dict[Name, Path] = {
        "images": cache_dir() / "images",
        "templates": cache_dir() / "templates",
        "runs": runs_dir(state_dir()) if os.path.lexists(state_dir()) else state_dir().parent / "runs",
        "records": state_dir(),
        "cache": cache_dir(),
    }
    prunable = dict.fromkeys(places, 0)
    for removed in prune(PARTS, progress=progress, dry_run=True).removed:
        path = Path(removed.path)
        prunable[next((name for name, place in places.items() if path.is_relative_to(place)), "cache")] += removed.bytes
    seen: set[tuple[int, int]] = set()
    parts = []
    for name, place in places.items():  # the whole cache comes last, for what is not counted yet
        found = sizes_by_file(place)
        sizes = [size for file, size in found.items() if file not in seen]
        seen |= found.keys()
        used = {"files": len(sizes), "bytes": sum(sizes), "prunable_bytes": prunable[name]}
        parts.append(PartUsage(name=name, path=str(place), **used))
    return DfReport(
        parts=tuple(parts),
        bytes=sum(part.bytes for part in parts),
        prunable_bytes=sum(part.prunable_bytes for part in parts),
    )
