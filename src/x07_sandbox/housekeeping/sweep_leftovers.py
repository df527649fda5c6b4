"""The rest of a sweep: changes that were applied by halves, folders past retention, saved machines that none needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from x07_sandbox.host.paths import state_dir
from x07_sandbox.housekeeping.cache import prune_saved
from x07_sandbox.housekeeping.pruner import Pruner, entries
from x07_sandbox.housekeeping.records import prune_records
from x07_sandbox.jail.cgroups import remove_abandoned_groups
from x07_sandbox.runs.folder import APPLYING, RUN_NAME, runs_dir
from x07_sandbox.runs.saved_changes import recover_all

if TYPE_CHECKING:
    from x07_sandbox.housekeeping.pruner import Kept, Removed
    from x07_sandbox.housekeeping.sweep import Kind, Sweeper


def sweep_leftovers(sweeper: Sweeper) -> None:
    """Do all of it. Raises SandboxError."""
    _recover(sweeper)
    pruner = Pruner(sweeper.progress, dry_run=sweeper.dry_run)
    prune_records(pruner)
    prune_saved(pruner, set())
    report = pruner.report()
    for gone in report.removed:
        # What pruning calls a job is the folder of one that has ended.
        kind: Kind = "record" if gone.kind == "job" else cast("Kind", gone.kind)
        sweeper.removed(kind, _name(gone), gone.why)
    for kept in report.kept:
        sweeper.kept(cast("Kind", kept.kind), _name(kept), kept.why, failed=kept.failed)
    if not sweeper.dry_run:
        remove_abandoned_groups()


def _name(thing: Removed | Kept) -> str:
    return Path(thing.path).name if thing.kind in {"job", "run"} else thing.path


def _recover(sweeper: Sweeper) -> None:
    folder = runs_dir(state_dir()) / APPLYING
    before = {path.name for path in entries(folder) if RUN_NAME.fullmatch(path.name)}
    if not sweeper.dry_run:
        recover_all(sweeper.progress)
    left = {path.name for path in entries(folder)} if not sweeper.dry_run else set()
    for run in sorted(before):
        if run in left:
            sweeper.kept("changes", run, "its changes are being applied, or cannot be put right yet")
        else:
            sweeper.removed("changes", run, "its changes were applied by halves")
