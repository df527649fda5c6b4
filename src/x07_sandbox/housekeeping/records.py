"""Prune records of jobs and folders of runs that ended longer ago than the retention.

A record goes only if it is ours by its owner.json, says that its machine is gone, and no process of it lives. Every
other one stays and is reported. Every run under way shares a lock on its folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from x07_sandbox.errors import UsageError
from x07_sandbox.host import settings
from x07_sandbox.host.locks import folder_to_remove, is_locked
from x07_sandbox.host.paths import foreign, private_dir, read_bounded, state_dir
from x07_sandbox.host.processes import Identity, boot_id, is_alive, pid_namespace
from x07_sandbox.housekeeping.pruner import entries
from x07_sandbox.jobs.record import JOB_SCHEMA, OWNER_SCHEMA, runner_instance
from x07_sandbox.runs.folder import APPLYING, runs_dir

if TYPE_CHECKING:
    from x07_sandbox.housekeeping.pruner import Pruner

_RUN: Final = re.compile(r"(\d{1,15})-\d{1,10}-\d{1,10}")
_JOB: Final = re.compile(rf"({_RUN.pattern})-[a-z]+")
_DOOMED: Final = ".pruned-"  # a name that no reader takes for a record
_RECORD_MAX: Final = settings.MIB
_ENDS: Final = ("done", "reaped")


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A record as it lies there. ended: when it was said to be over; None if it was not."""

    folder: Path
    run: str
    ended: os.stat_result | None


def prune_records(pruner: Pruner) -> None:
    """Remove what may go of the records. Raises SandboxError."""
    if not os.path.lexists(state_dir()):
        return
    root = private_dir(state_dir())
    runs = runs_dir(root)
    if os.path.lexists(runs):
        private_dir(runs)
    for path in (*entries(root), *entries(runs)):
        if path.name.startswith(_DOOMED) and not foreign(path.lstat(), stat.S_ISDIR):
            pruner.remove("leftover", path, "a killed prune left it", shutil.rmtree)
    instance = runner_instance(root)
    jobs = [job for path in entries(root) if (job := _job_at(path, pruner)) is not None]
    busy: set[str] = {job.run for job in jobs if job.ended is None}
    known = {job.run for job in jobs} | {path.name for path in entries(runs)}
    busy |= {run for run in known if _RUN.fullmatch(run) and is_locked(runs / run)}
    # What was applied by halves, and could not be put right yet, needs what lies in its folder.
    busy |= {path.name for path in entries(runs / APPLYING)}
    for job in jobs:
        if job.run in busy or job.ended is None or not pruner.old(job.ended):
            if job.ended is None and pruner.old(job.folder.lstat()):
                pruner.keep("job", job.folder, "nothing says that its machine is gone: it has neither done nor reaped")
        elif problem := _doubt(job.folder, instance):
            busy.add(job.run)
            pruner.keep("job", job.folder, problem)
        else:
            pruner.remove("job", job.folder, "it ended more than 7 days ago", _remove_record)
    _prune_runs(runs, busy, pruner)


def _prune_runs(runs: Path, busy: set[str], pruner: Pruner) -> None:
    """busy: runs that are under way, or of which a job's record stays."""
    for path in entries(runs):
        match = _RUN.fullmatch(path.name)
        if match is None or path.name in busy:
            continue
        young = pruner.now_ms - int(match[1]) <= settings.RETENTION_S * 1000
        if not young and pruner.old(path.lstat()):
            pruner.remove_own("run", path, "it ended more than 7 days ago", _remove_run)


def _job_at(path: Path, pruner: Pruner) -> Job | None:
    """The record of a job there; None for what is none."""
    match = _JOB.fullmatch(path.name)
    if match is None:
        return None
    info = path.lstat()
    if problem := foreign(info, stat.S_ISDIR):
        if pruner.old(info):
            pruner.keep("job", path, problem)
        return None
    ends = [found for name in _ENDS if (found := _regular(path / name)) is not None]
    return Job(folder=path, run=match[1], ended=ends[0] if ends else None)


def _regular(path: Path) -> os.stat_result | None:
    try:
        info = path.lstat()
    except OSError:
        return None
    return None if foreign(info, stat.S_ISREG) else info


def _doubt(folder: Path, instance: str) -> str:
    """Why a record stays; empty if it is ours and over."""
    document: dict[str, Any] = {}
    for name, schema in (("job.json", JOB_SCHEMA), ("owner.json", OWNER_SCHEMA)):
        if _regular(folder / name) is None:
            return f"it has no {name} of ours: x07-sandbox did not make it, or it is damaged"
        try:
            document = json.loads(read_bounded(folder / name, "record", _RECORD_MAX).decode())
            version = document["schema_version"]
        except (UsageError, ValueError, KeyError, TypeError, RecursionError):
            return f"its {name} is damaged"
        if version != schema:
            return f"its {name} is of another format: {ascii(version)[:80]}"
    try:
        if document["labels"]["io.x07.runner_instance"] != instance:
            return "it is of another runner"
        return "a process of it lives" if _some_live(document) else ""
    except (ValueError, KeyError, TypeError, RecursionError):
        return "its owner.json is damaged"


def _some_live(owner: dict[str, Any]) -> bool:
    """Whether a process that was started for the job lives. Raises KeyError, TypeError for what is no owner.json."""
    if owner["boot_id"] != boot_id() or owner["pid_namespace"] != pid_namespace():
        return False  # its numbers mean nothing here, and done says that they are gone
    return any(is_alive(Identity(**fields)) for fields in owner["processes"].values())


def _remove_record(folder: Path) -> None:
    """Remove a record so that at no time one lies there without its done: others act on such. Raises OSError."""
    doomed = folder.with_name(f"{_DOOMED}{folder.name}")
    folder.rename(doomed)
    (doomed / "job.json").unlink(missing_ok=True)
    shutil.rmtree(doomed)


def _remove_run(folder: Path) -> None:
    """Remove the folder of a run that nobody shares. Raises OSError."""
    with folder_to_remove(folder) as free:
        if not free:
            raise BlockingIOError(0, "the run is under way")
        doomed = folder.with_name(f"{_DOOMED}{folder.name}")
        folder.rename(doomed)
        shutil.rmtree(doomed)
