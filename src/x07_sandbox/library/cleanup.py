"""Clean-up of state and cache: sweep, prune and disk usage, over jobs, containers, images and saved VMs."""

import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Final

from x07_sandbox.backends.registry import BY_NAME, create, find
from x07_sandbox.host import settings, verdicts
from x07_sandbox.host.locks import is_locked
from x07_sandbox.host.paths import cache_dir, entries, private_dir, state_dir, why_not_ours
from x07_sandbox.images.build import prune_images
from x07_sandbox.images.commands import remove_tree
from x07_sandbox.images.store import list_images
from x07_sandbox.jail.resources import remove_abandoned_groups
from x07_sandbox.records.pruning import (
    PARTS,
    DfReport,
    Part,
    PartName,
    PartUsage,
    Pruner,
    PruneReport,
    Row,
    prune_records,
    sizes_by_file,
    sweep_temporaries,
)
from x07_sandbox.records.runs import APPLYING, KILL, RUN_NAME, SOCKET, run_folder, run_names, runs_dir
from x07_sandbox.records.sweep import SweepReport, sweep_jobs, sweep_orphans, sweep_report
from x07_sandbox.sessions.saved_changes import recover_all

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_VERDICT: Final = re.compile(r"[a-z-]+-[0-9a-f]{32}\.json")
_UNPACKED: Final = "gvisor"  # unpacked files of images (backends/gvisor)
_WITH_TEMPORARIES: Final = ("artifacts", verdicts.FOLDER)


def sweep(*, dry_run: bool, progress: Callable[[str], None]) -> SweepReport:
    """Remove what dead x07 processes left. Raises SandboxError if a folder of this tool cannot be used.

    Besides jobs and containers (records/sweep), these are incomplete file changes, expired folders, saved VMs without
    an image, and control groups, pipes and sockets.
    """
    pruner = Pruner(progress, dry_run=dry_run)
    if os.path.lexists(state_dir()):
        live = sweep_jobs(pruner, find)
        sweep_orphans(pruner, {name: create(name) for name in BY_NAME}, live)
        _sweep_changes(pruner)
        prune_records(pruner)
        prune_saved(pruner, set())
        if not pruner.dry_run:
            remove_abandoned_groups()
            for run in map(run_folder, run_names()):
                if not is_locked(run):
                    for name in (KILL, SOCKET):
                        (run / name).unlink(missing_ok=True)
    return sweep_report(pruner)


def _sweep_changes(pruner: Pruner) -> None:
    """Roll back or complete file changes that were interrupted."""
    folder = runs_dir(state_dir()) / APPLYING
    before = {path.name for path in entries(folder) if RUN_NAME.fullmatch(path.name)}
    if not pruner.dry_run:
        recover_all(pruner.progress)
    left = set() if pruner.dry_run else {path.name for path in entries(folder)}
    for run in sorted(before):
        if run in left:
            pruner.kept.append(Row("changes", run, "its changes are being applied, or cannot be recovered yet"))
        else:
            pruner.removed.append(Row("changes", run, "its changes were applied incompletely"))


def prune(parts: Collection[Part], *, progress: Callable[[str], None], dry_run: bool) -> PruneReport:
    """Remove unused files of the given *parts*. Raises SandboxError if a folder of this tool cannot be used."""
    pruner = Pruner(progress, dry_run=dry_run)
    gone = prune_images(pruner, images_in_use()) if "images" in parts else set()
    if {"images", "cache"} & set(parts):
        prune_saved(pruner, gone)
    if "cache" in parts:
        _prune_cache(pruner)
    if "runs" in parts:
        prune_records(pruner, unapplied=True)
    return pruner.report()


def images_in_use() -> set[str]:
    """Return the digests of the images that snapshots and paused sandboxes need. Raises SandboxError."""
    found = (backend.snapshots for backend in map(create, BY_NAME))
    return {kept.image for snapshots in found if snapshots is not None for kept in snapshots.kept()}


def prune_saved(pruner: Pruner, gone: set[str]) -> None:
    """Remove saved VMs of missing images and of images with a digest in *gone*. Raises SandboxError."""
    if not os.path.lexists(cache_dir()):
        return
    images = {image.digest for image in list_images()} - gone
    for backend in map(create, BY_NAME):
        if backend.cloning is None:
            continue
        on_wait = partial(pruner.progress, "waiting until another process has saved a VM")
        for one in backend.cloning.prunable(images, on_wait):
            remove = pruner.remove if one.kind == "leftover" else pruner.remove_own
            remove(one.kind, one.path, one.why, one.remove)


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


def disk_usage(progress: Callable[[str], None]) -> DfReport:
    """Measure each part of state and cache. Raises SandboxError if a folder of this tool cannot be used."""
    places: dict[PartName, Path] = {
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


def image_sizes() -> tuple[dict[str, int], dict[str, int], int]:
    """Return the disk space of each image's own files, of its saved VMs, and of all of them. Raises SandboxError.

    The dictionaries have digests as keys. A file that several images share counts only in the sum of all.
    """
    places = [path for path in entries(cache_dir() / "images") if _DIGEST.fullmatch(path.name)]
    images = {f"sha256:{path.name}": sizes_by_file(path) for path in places}
    owners = Counter(file for files in images.values() for file in files)
    own = {name: sum(size for file, size in files.items() if owners[file] == 1) for name, files in images.items()}
    saved = Counter[str]()
    for backend in map(create, BY_NAME):
        saved.update({} if backend.cloning is None else backend.cloning.saved_bytes())
    everywhere = sizes_by_file(cache_dir() / "images") | sizes_by_file(cache_dir() / "templates")
    return own, saved, sum(everywhere.values())
