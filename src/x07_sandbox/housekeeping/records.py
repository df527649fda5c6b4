"""Prune records of jobs and folders of runs that ended longer ago than the retention.

A record goes only if it is ours by its owner.json, says that its machine is gone, and no process of it lives. Every
other one stays and is reported. Every run under way shares a lock on its folder.
"""

from __future__ import annotations

import os
import shutil
import stat
from typing import TYPE_CHECKING, Final

from x07_sandbox.host import settings
from x07_sandbox.host.locks import is_locked, lock_for_removal
from x07_sandbox.host.paths import private_dir, state_dir, why_not_ours
from x07_sandbox.host.processes import boot_id, is_alive, pid_namespace
from x07_sandbox.housekeeping.pruner import entries
from x07_sandbox.jobs.reader import all_stored
from x07_sandbox.runs.folder import APPLYING, RUN_NAME, runs_dir

if TYPE_CHECKING:
    from pathlib import Path

    from x07_sandbox.housekeeping.pruner import Pruner
    from x07_sandbox.jobs.reader import StoredJob

_DOOMED: Final = ".pruned-"  # a name that no reader takes for a record


def prune_records(pruner: Pruner) -> None:
    """Remove what may go of the records. Raises SandboxError."""
    if not os.path.lexists(state_dir()):
        return
    root = private_dir(state_dir())
    runs = runs_dir(root)
    if os.path.lexists(runs):
        private_dir(runs)
    for path in (*entries(root), *entries(runs)):
        if path.name.startswith(_DOOMED) and not why_not_ours(path.lstat(), stat.S_ISDIR):
            pruner.remove("leftover", path, "a killed removal left it", shutil.rmtree)
    jobs = _jobs(root, pruner)
    busy: set[str] = {job.run for job in jobs if job.ended is None}
    known = {job.run for job in jobs} | {path.name for path in entries(runs)}
    busy |= {run for run in known if RUN_NAME.fullmatch(run) and is_locked(runs / run)}
    # What was applied by halves, and could not be put right yet, needs what lies in its folder.
    busy |= {path.name for path in entries(runs / APPLYING)}
    for job in jobs:
        if job.run in busy or not _ended_long_ago(job, pruner):
            if job.ended is None and pruner.old(job.info):
                pruner.keep("job", job.folder, "nothing says that its machine is gone: it has neither done nor reaped")
        elif problem := _doubt(job):
            busy.add(job.run)
            pruner.keep("job", job.folder, problem)
        else:
            pruner.remove("job", job.folder, "it ended more than 7 days ago", remove_record)
    _prune_runs(runs, busy, pruner)


def _jobs(root: Path, pruner: Pruner) -> list[StoredJob]:
    """The records of jobs there; a link, or a folder of another user, is none and is reported."""
    jobs = []
    for stored in all_stored(root):
        if not why_not_ours(stored.info, stat.S_ISDIR):
            jobs.append(stored)
        elif pruner.old(stored.info):
            pruner.keep("job", stored.folder, stored.why)
    return jobs


def _prune_runs(runs: Path, busy: set[str], pruner: Pruner) -> None:
    """busy: runs that are under way, or of which a job's record stays."""
    for path in entries(runs):
        if not RUN_NAME.fullmatch(path.name) or path.name in busy:
            continue
        young = pruner.now_ms - int(path.name.partition("-")[0]) <= settings.RETENTION_S * 1000
        if not young and pruner.old(path.lstat()):
            pruner.remove_own("run", path, "it ended more than 7 days ago", _remove_run)


def _ended_long_ago(job: StoredJob, pruner: Pruner) -> bool:
    """Whether its end was recorded long ago. The folder's time counts too: `reaped` is a link to an older file."""
    return job.ended_info is not None and pruner.old(job.ended_info) and pruner.old(job.info)


def _doubt(job: StoredJob) -> str:
    """Why a record stays; empty if it is ours and over."""
    if job.owner is None:
        return job.why
    if job.owner.boot_id != boot_id() or job.owner.pid_namespace != pid_namespace():
        return ""  # its numbers mean nothing here, and done says that they are gone
    return "a process of it lives" if any(map(is_alive, job.owner.processes.values())) else ""


def doomed_name(folder: Path) -> Path:
    """Where a folder goes that is being removed: no reader takes that name for a job's or a run's."""
    return folder.with_name(f"{_DOOMED}{folder.name}")


def remove_record(folder: Path) -> None:
    """Remove a record so that at no time one lies there without its done: others act on such. Raises OSError."""
    doomed = doomed_name(folder)
    folder.rename(doomed)
    (doomed / "job.json").unlink(missing_ok=True)
    shutil.rmtree(doomed)


def _remove_run(folder: Path) -> None:
    """Remove the folder of a run that nobody shares. Raises OSError."""
    with lock_for_removal(folder) as free:
        if not free:
            raise BlockingIOError(0, "the run is under way")
        doomed = doomed_name(folder)
        folder.rename(doomed)
        shutil.rmtree(doomed)
