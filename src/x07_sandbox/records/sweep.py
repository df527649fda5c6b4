"""Sweep: end and remove the jobs that dead x07 processes left, and nothing else.

It ends this user's jobs whose x07 process is dead or whose deadline has passed (records/reader). It removes folders of
jobs that never started, and an engine's containers without a record. Everything else stays and is reported.

Sweeps and running x07 processes may work concurrently. A sweep locks a job's folder while it decides about the job and
ends it. If the folder is already locked, the sweep skips the job.
"""

import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Final, Literal, cast

import msgspec

from x07_sandbox.errors import SandboxError
from x07_sandbox.host import settings
from x07_sandbox.host.locks import is_locked
from x07_sandbox.host.paths import private_dir, state_dir
from x07_sandbox.host.processes import identify
from x07_sandbox.host.waiting import Deadline, unix_ms
from x07_sandbox.records.pruning import Pruner, Row, doomed_name
from x07_sandbox.records.reader import Now, StoredJob, here_and_now, judge, locked_stored
from x07_sandbox.records.runs import ENDS, JOB_NAME, run_folder, runner_instance, unfinished_jobs
from x07_sandbox.records.stopping import FindBackend, HoldsInstances

# job: a job that was ended, cleaned up and recorded as reaped. unstarted: the folder of a job that never started.
# instance: a container without a job's record. changes: incomplete file changes. record, run: folders past their
# retention time.
Kind = Literal["job", "unstarted", "instance", "changes", "record", "run", "template", "leftover"]
_AT_START: Final = 512  # the newest jobs, to bound the cost of a start
_UNIX_MS: Final = re.compile(r"[0-9]{1,16}")
_ORPHANS_MAX: Final = 4096
_RUN_PID: Final = re.compile(r"[^-]*-([0-9]{1,10})(?:-|\Z)")
_OWN_BACKENDS: Final = frozenset({"qemu", "os", "none"})  # X07's tools use none of these
_UPSTREAM_PHASES: Final = frozenset({"build", "run"})
_SETTLED_MS: Final = 60_000
_SURELY_MS: Final = 3_600_000  # far longer than a runner takes to write owner.json


class Swept(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """An object that was removed or kept, and why.

    id: the id of a job, a run or a container, or a path. failed: whether an attempt to remove the object failed.
    """

    kind: Kind
    id: str
    why: str
    failed: bool = False


class SweepReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The output of `x07 sweep --json`. dry_run: whether it only showed what it would remove."""

    schema_version: Literal["x07.sandbox.sweep@0.1.0"] = "x07.sandbox.sweep@0.1.0"
    dry_run: bool
    removed: tuple[Swept, ...]
    kept: tuple[Swept, ...]


def sweep_report(pruner: Pruner) -> SweepReport:
    """Return the report on everything that a sweep removed or kept."""
    removed, kept = _swept(pruner.removed, records="record"), _swept(pruner.kept, records="job")
    return SweepReport(dry_run=pruner.dry_run, removed=removed, kept=kept)


def _swept(rows: Iterable[Row], *, records: str) -> tuple[Swept, ...]:
    """Return the rows of the report. Of several about one thing, the first counts. records: the kind of pruned jobs."""
    found: dict[tuple[str, str], Swept] = {}
    for row in rows:
        kind, path = row.kind, Path(row.name)
        pruned = path.is_absolute() and kind in {"job", "run"}
        kind, name = records if pruned and kind == "job" else kind, path.name if pruned else row.name
        found.setdefault((kind, name), Swept(kind=cast("Kind", kind), id=name, why=row.why, failed=row.failed))
    return tuple(found.values())


def sweep_jobs(pruner: Pruner, find: FindBackend, budget_s: float | None = None) -> set[str]:
    """End the jobs that may be ended, and return the names of live jobs. Raises SandboxError.

    budget_s: check only the newest jobs, and begin no further job after this time. None: check all jobs.
    """
    root = private_dir(state_dir())
    instance, now, live = runner_instance(root), here_and_now(), set()
    deadline = None if budget_s is None else Deadline.after(budget_s)
    for name in unfinished_jobs(root, None if budget_s is None else _AT_START):
        if deadline is not None and deadline.passed():
            break
        with locked_stored(root / name, instance) as stored:
            if stored is None or not _settled(pruner, find, stored, now):
                live.add(name)
    return live


def _settled(pruner: Pruner, find: FindBackend, stored: StoredJob, now: Now) -> bool:
    """Sweep one job, whose folder the caller has locked. Return False if the job counts as live."""
    judgement = judge(stored, now)
    name = stored.folder.name
    if judgement.fate == "kept":
        if why := _why_unstarted(stored):
            if pruner.dry_run or _remove_unstarted(stored.folder):
                pruner.removed.append(Row("unstarted", name, why))
            return True
        pruner.kept.append(Row("job", name, stored.why))
        return stored.standing != "unowned"
    if judgement.fate in {"live", "ended"}:
        return judgement.fate == "ended"
    if not pruner.dry_run and (problem := _not_stopped(stored, find)):
        pruner.kept.append(Row("job", name, f"{judgement.why}, and {problem}", failed=True))
    else:
        pruner.removed.append(Row("job", name, judgement.why))
    return True


def _not_stopped(stored: StoredJob, find: FindBackend) -> str:
    """Stop a job by its record. Return why the job is not proven gone, or "" if it is."""
    record = stored.record
    assert record is not None  # the job is ours
    if (backend := find(record.backend)) is None:
        return f"this version has no backend {record.backend!a}"
    try:
        return "" if backend.stop(record) else "nothing proves that its processes are gone"
    except SandboxError as exc:
        return f"it cannot be stopped ({exc.what}: {exc.why})"
    except OSError as exc:  # the other jobs must be swept all the same
        return f"it cannot be stopped ({exc.strerror or exc})"


def _why_unstarted(stored: StoredJob) -> str:
    """Return why the folder of a job that never started can be removed, or "" if the folder must stay.

    This tool must have made the folder: X07's own tools also write a job.json without an owner.json. No process may be
    about to start the job. If the job belongs to a run, that run must not be in progress. Any other job, such as that
    of a probe, must be older than a minute, or than an hour if a process has the pid in the job's name.
    """
    match = JOB_NAME.fullmatch(stored.folder.name)
    if match is None or stored.standing != "unowned" or os.path.lexists(stored.folder / "owner.json"):
        return ""
    run = run_folder(match[1])
    backend = stored.job.backend if stored.job is not None else ""
    ours = backend in _OWN_BACKENDS or match[4] not in _UPSTREAM_PHASES or run.is_dir()
    if not ours or is_locked(run) or not _holds_nothing(stored.folder):
        return ""
    age_ms = unix_ms() - stored.info.st_mtime_ns // 1_000_000
    creator_lives = os.path.exists(f"/proc/{int(match[3])}")  # noqa: PTH110 - in /proc
    # Jobs of a run exist only while the run is locked.
    if run.is_dir() or age_ms > (_SURELY_MS if creator_lives else _SETTLED_MS):
        return "it was never started, and the x07 process that created it is gone"
    return ""


def _holds_nothing(folder: Path) -> bool:
    """Whether a folder contains only files that x07 writes before it starts anything."""
    try:
        names = os.listdir(folder)  # noqa: PTH208 - names are wanted
    except OSError:
        return False
    return all(name == "job.json" or name.startswith((".job.json.", ".owner.json.")) for name in names)


def _remove_unstarted(folder: Path) -> bool:
    """Remove the folder of an unstarted job. Return whether it is gone. A later start of the job will fail."""
    doomed = doomed_name(folder)
    try:
        folder.rename(doomed)
        if os.path.lexists(doomed / "owner.json"):  # the job was just started
            doomed.rename(folder)
            return False
        shutil.rmtree(doomed)
    except OSError:
        return False
    return True


def why_kept(labels: Mapping[str, str], *, instance: str, live: Collection[str], now_unix_ms: float) -> str:
    """Return why a container must stay, or "" if it can be removed. live: the names of recorded jobs that are live.

    Anyone with access to the engine can set the labels, so they are not trusted.
    """
    if labels.get("io.x07.schema") != "1":
        return "it has no io.x07.schema label of this version"
    if labels.get("io.x07.runner_instance") != instance:
        return "it belongs to another user or host"
    if labels.get("io.x07.job_id") in live or labels.get("io.x07.run_id") in live:
        return "its job is recorded as live"
    deadline = labels.get("io.x07.deadline_unix_ms", "")
    if not _UNIX_MS.fullmatch(deadline):
        return "its deadline label is damaged"
    if now_unix_ms <= int(deadline) + settings.CLEANUP_MS:
        return "its deadline has not passed"
    return ""


def _is_over(job: str) -> bool:
    """Return whether our own records say that this job is gone. Its container was then created while it was ended."""
    return JOB_NAME.fullmatch(job) is not None and any(os.path.lexists(state_dir() / job / name) for name in ENDS)


def sweep_orphans(pruner: Pruner, backends: Mapping[str, object], live: Collection[str]) -> None:
    """Remove this tool's containers without a live job from every engine. live: names of the live jobs."""
    instance = runner_instance(state_dir())
    for name, backend in backends.items():
        if not isinstance(backend, HoldsInstances):
            continue
        try:
            for orphan in list(backend.orphans())[:_ORPHANS_MAX]:
                called = f"{name}:{orphan.id}"
                over = _is_over(orphan.labels.get("io.x07.job_id", ""))
                now = float("inf") if over else unix_ms()
                if problem := why_kept(orphan.labels, instance=instance, live=live, now_unix_ms=now):
                    pruner.kept.append(Row("instance", called, problem))
                # A process with the pid in the run's id may be the container's runner.
                elif (run := _RUN_PID.match(orphan.labels.get("io.x07.run_id", ""))) and identify(int(run[1])):
                    why = "the x07 process that started it may be alive, with its record in another folder"
                    pruner.kept.append(Row("instance", called, why))
                elif pruner.dry_run or backend.remove(orphan):
                    why = "its job has ended" if over else "it has no record, and its deadline has passed"
                    pruner.removed.append(Row("instance", called, why))
                else:
                    pruner.kept.append(Row("instance", called, "it was removed, but still exists", failed=True))
        except SandboxError as exc:
            pruner.kept.append(Row("instance", name, f"{exc.what}: {exc.why}"))
