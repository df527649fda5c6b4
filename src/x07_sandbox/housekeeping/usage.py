"""Disk space of state and cache, and how much of it pruning would free, for `x07 df`."""

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec

from x07_sandbox.host.paths import cache_dir, state_dir
from x07_sandbox.housekeeping.prune import prune
from x07_sandbox.housekeeping.pruner import BLOCK, PARTS, everything
from x07_sandbox.runs.folder import runs_dir

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
        sizes = list(_sizes(place, seen))
        used = {"files": len(sizes), "bytes": sum(sizes), "prunable_bytes": prunable[name]}
        parts.append(PartUsage(name=name, path=str(place), **used))
    return DfReport(
        parts=tuple(parts),
        bytes=sum(part.bytes for part in parts),
        prunable_bytes=sum(part.prunable_bytes for part in parts),
    )


def _sizes(folder: Path, seen: set[tuple[int, int]]) -> Iterator[int]:
    """Yield the size of each file below *folder*; links are not followed, and hard links count once."""
    for info in itertools.islice(everything(folder), 1, None):  # the first is the folder itself
        file = info.st_dev, info.st_ino
        if file not in seen:
            seen.add(file)
            yield info.st_blocks * BLOCK
