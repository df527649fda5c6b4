"""Pruning of the records of runs: run folders, and the records of their jobs.

The newest records stay, within an age, a number and a size (host/user_settings). A run in progress holds a shared lock
on its folder. A job's record is removed only if its owner.json is valid for this user, the job's machine is recorded as
gone, and no process of the job is alive.
"""

import math
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from x07_sandbox.host import settings
from x07_sandbox.host.clocks import Deadline
from x07_sandbox.host.linux import boot_id, pid_namespace
from x07_sandbox.host.locks import is_locked, lock_for_removal
from x07_sandbox.host.paths import private_dir, state_dir, why_not_ours
from x07_sandbox.host.processes import is_alive
from x07_sandbox.host.user_settings import DiskLimits, disk_limits
from x07_sandbox.housekeeping.pruner import Pruner, entries, sizes_by_file
from x07_sandbox.records.active import JOB_NAME
from x07_sandbox.records.reader import StoredJob, read_stored
from x07_sandbox.records.record import runner_instance
from x07_sandbox.sessions.folder import APPLYING, RUN_NAME, runs_dir

_DOOMED: Final = ".pruned-"  # no name of a record
_YOUNG_S: Final = 3600.0  # records of the last hour stay, however many there are


def prune_records(pruner: Pruner, *, unapplied: bool = False, budget_s: float = math.inf) -> bool:
    """Remove the records of runs that exceed the limits. Return whether budget_s, in seconds, was enough for all.

    unapplied: whether this includes runs with changes that were not applied. Raises SandboxError for an unusable state
    folder and for invalid settings.
    """
    if not os.path.lexists(state_dir()):
        return True
    root = private_dir(state_dir())
    runs = runs_dir(root)
    if os.path.lexists(runs):
        private_dir(runs)
    of_jobs, of_runs = entries(root), entries(runs)
    for path in (*of_jobs, *of_runs):
        if path.name.startswith(_DOOMED) and not why_not_ours(path.lstat(), stat.S_ISDIR):
            pruner.remove("leftover", path, "an interrupted removal left it", shutil.rmtree)
    jobs: dict[str, list[Path]] = {path.name: [] for path in of_runs if RUN_NAME.fullmatch(path.name)}
    for path in of_jobs:
        if match := JOB_NAME.fullmatch(path.name):
            jobs.setdefault(match[1], []).append(path)
    limits = disk_limits()
    excess = [*_excess(runs, list(jobs), limits, pruner.now_ms, Deadline.after(budget_s / 2))]
    deadline = Deadline.after(budget_s / 2)
    applying = {path.name for path in entries(runs / APPLYING)}  # their folders are needed for recovery
    for run, why in reversed(excess):
        if run not in applying:
            _prune_run(runs / run, jobs[run], why, pruner, days=limits.runs_days, unapplied=unapplied)
        if deadline.passed():
            return False
    return True


def _excess(
    runs: Path, names: list[str], limits: DiskLimits, now_ms: int, deadline: Deadline
) -> Iterator[tuple[str, str]]:
    """Yield the runs that exceed a limit, newest first, each with the reason, or "" if it is their age.

    deadline: when to stop measuring sizes.
    """
    taken = 0
    names.sort(key=lambda name: int(name.partition("-")[0]), reverse=True)
    for number, run in enumerate(names):
        started_ms = int(run.partition("-")[0])
        if now_ms - started_ms > limits.runs_days * settings.DAY_S * 1000:
            yield run, ""
        elif number >= limits.runs_max:
            yield run, f"{limits.runs_max} runs are newer"
        elif not deadline.passed():
            taken += sum(sizes_by_file(runs / run).values())
            if taken > limits.runs_mib << 20:
                yield run, f"with newer runs, it takes more than {limits.runs_mib} MiB"


def _prune_run(folder: Path, of_jobs: list[Path], why: str, pruner: Pruner, *, days: int, unapplied: bool) -> None:
    """Remove the records of one run that exceeds a limit, unless they are needed. why, unapplied: as above."""
    jobs = _jobs(of_jobs, pruner, days * settings.DAY_S)
    if any(job.ended is None for job in jobs) or is_locked(folder):
        return
    changes = folder / "changes"  # applying or undoing changes writes in it, or in a folder for later changes
    touched = [path for path in (folder, changes, *changes.glob("later-*")) if os.path.lexists(path)]
    infos = [path.lstat() for path in touched] + [info for job in jobs for info in (job.info, job.ended_info) if info]
    if saved := os.path.lexists(changes / "changes.json"):
        why = ""  # saved changes and undo data are kept as long as their age allows
    if not all(pruner.old(info, _YOUNG_S if why else days * settings.DAY_S) for info in infos):
        return
    if saved and not unapplied and not os.path.lexists(changes / "undo"):
        return
    for job in jobs:
        if problem := _doubt(job):
            pruner.keep("job", job.folder, problem)
            return
    why = why or f"it ended more than {days} days ago"
    for job in jobs:
        pruner.remove("job", job.folder, why, remove_record)
    if os.path.lexists(folder):
        pruner.remove_own("run", folder, why, _remove_run)


def _jobs(folders: list[Path], pruner: Pruner, limit_s: float) -> list[StoredJob]:
    """Return the records of this user's jobs. Report old jobs that may still exist, old links and others' folders."""
    jobs = []
    for folder in folders:
        if (stored := read_stored(folder, runner_instance(folder.parent))) is None:
            continue
        ours = not why_not_ours(stored.info, stat.S_ISDIR)
        if ours:
            jobs.append(stored)
        if pruner.old(stored.info, limit_s) and not (ours and stored.ended):
            why = "its VM or container is not recorded as gone, so it may still exist"
            pruner.keep("job", folder, why if ours else stored.why)
    return jobs


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
