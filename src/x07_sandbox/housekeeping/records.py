"""Pruning of job records and run folders that are older than the retention time.

A job's record is removed only if its owner.json is valid for this user, the job's machine is recorded as gone, and no
process of the job is alive. A run in progress holds a shared lock on its folder.
"""

import os
import shutil
import stat
from pathlib import Path
from typing import Final

from x07_sandbox.host import settings
from x07_sandbox.host.linux import boot_id, pid_namespace
from x07_sandbox.host.locks import is_locked, lock_for_removal
from x07_sandbox.host.paths import private_dir, state_dir, why_not_ours
from x07_sandbox.host.processes import is_alive
from x07_sandbox.housekeeping.pruner import Pruner, entries
from x07_sandbox.jobs.reader import StoredJob, all_stored
from x07_sandbox.runs.folder import APPLYING, RUN_NAME, runs_dir

_DOOMED: Final = ".pruned-"  # no name of a record


def prune_records(pruner: Pruner) -> None:
    """Remove the job records and run folders that are too old. Raises SandboxError for an unusable state folder."""
    if not os.path.lexists(state_dir()):
        return
    root = private_dir(state_dir())
    runs = runs_dir(root)
    if os.path.lexists(runs):
        private_dir(runs)
    for path in (*entries(root), *entries(runs)):
        if path.name.startswith(_DOOMED) and not why_not_ours(path.lstat(), stat.S_ISDIR):
            pruner.remove("leftover", path, "an interrupted removal left it", shutil.rmtree)
    jobs = _jobs(root, pruner)
    busy: set[str] = {job.run for job in jobs if job.ended is None}
    known = {job.run for job in jobs} | {path.name for path in entries(runs)}
    busy |= {run for run in known if RUN_NAME.fullmatch(run) and is_locked(runs / run)}
    # Incomplete changes need their run's folder for recovery.
    busy |= {path.name for path in entries(runs / APPLYING)}
    for job in jobs:
        old = pruner.old(job.info)
        if job.run in busy or job.ended_info is None or not (old and pruner.old(job.ended_info)):
            if job.ended is None and old:
                pruner.keep("job", job.folder, "its VM or container is not recorded as gone, so it may still exist")
        elif problem := _doubt(job):
            busy.add(job.run)
            pruner.keep("job", job.folder, problem)
        else:
            pruner.remove("job", job.folder, "it ended more than 7 days ago", remove_record)
    _prune_runs(runs, busy, pruner)


def _jobs(root: Path, pruner: Pruner) -> list[StoredJob]:
    """Return the records of this user's jobs. Report old links and other users' old folders as kept."""
    jobs = []
    for stored in all_stored(root):
        if not why_not_ours(stored.info, stat.S_ISDIR):
            jobs.append(stored)
        elif pruner.old(stored.info):
            pruner.keep("job", stored.folder, stored.why)
    return jobs


def _prune_runs(runs: Path, busy: set[str], pruner: Pruner) -> None:
    """Remove old run folders. busy: the runs that are in progress or have a job record that stays."""
    for path in entries(runs):
        if not RUN_NAME.fullmatch(path.name) or path.name in busy:
            continue
        young = pruner.now_ms - int(path.name.partition("-")[0]) <= settings.RETENTION_S * 1000
        changes = path / "changes"  # applying or undoing changes writes in it, or in a folder for later changes
        touched = [path, changes, *changes.glob("later-*")]
        if not young and all(pruner.old(one.lstat()) for one in touched if os.path.lexists(one)):
            pruner.remove_own("run", path, "it ended more than 7 days ago", _remove_run)


def _doubt(job: StoredJob) -> str:
    """Return why a job's record must stay, or "" if it can be removed."""
    if job.owner is None:
        return job.why
    if job.owner.boot_id != boot_id() or job.owner.pid_namespace != pid_namespace():
        return ""  # its pids mean nothing here, and `done` proves that its processes are gone
    return "one of its processes is alive" if any(map(is_alive, job.owner.processes.values())) else ""


def doomed_name(folder: Path) -> Path:
    """Return the path to which a folder is renamed before its removal. Readers ignore folders with this name."""
    return folder.with_name(f"{_DOOMED}{folder.name}")


def remove_record(folder: Path) -> None:
    """Remove a job's record. An interrupted removal leaves no record that looks like a live job. Raises OSError."""
    doomed = doomed_name(folder)
    folder.rename(doomed)
    (doomed / "job.json").unlink(missing_ok=True)
    shutil.rmtree(doomed)


def _remove_run(folder: Path) -> None:
    """Remove the folder of a run that is not in progress. Raises OSError if that fails."""
    with lock_for_removal(folder) as free:
        if not free:
            raise BlockingIOError(0, "the run is in progress")
        doomed = doomed_name(folder)
        folder.rename(doomed)
        shutil.rmtree(doomed)
