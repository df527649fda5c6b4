"""Sweep: end and remove what dead x07 processes left, and nothing else.

It ends this user's jobs whose x07 process is dead or whose deadline has passed (jobs/stop_rules). It removes folders
of jobs that never started, an engine's containers without a record, folders past their retention time and saved VMs
without an image. It rolls back incomplete file changes. Everything else stays and is reported.

Sweeps and running x07 processes may work concurrently. A sweep locks a job's folder while it decides about the job and
ends it. If the folder is already locked, the sweep skips the job.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, cast

import msgspec

from x07_sandbox.backends.base import HoldsInstances
from x07_sandbox.backends.registry import built, create
from x07_sandbox.errors import SandboxError
from x07_sandbox.host import settings
from x07_sandbox.host.clocks import Deadline, unix_ms
from x07_sandbox.host.locks import is_locked
from x07_sandbox.host.paths import private_dir, state_dir
from x07_sandbox.host.processes import identify
from x07_sandbox.housekeeping.records import doomed_name
from x07_sandbox.jobs.active import JOB_NAME, unfinished_jobs
from x07_sandbox.jobs.reader import locked_stored
from x07_sandbox.jobs.record import runner_instance
from x07_sandbox.jobs.stop_rules import here_and_now, judge
from x07_sandbox.runs.folder import APPLYING, RUN_NAME, runs_dir

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from x07_sandbox.backends.base import Backend
    from x07_sandbox.jobs.reader import StoredJob
    from x07_sandbox.jobs.stop_rules import Now

# job: a job that was ended, cleaned up and recorded as reaped. unstarted: the folder of a job that never started.
# instance: a container without a job's record. changes: incomplete file changes. record, run: folders past their
# retention time.
Kind = Literal["job", "unstarted", "instance", "changes", "record", "run", "template", "leftover"]
_AT_START: Final = 512  # the newest jobs, to bound the cost of a start
_ALL: Final = 1 << 30
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


class Sweeper:
    """The options and results of one sweep."""

    def __init__(self, progress: Callable[[str], None], *, dry_run: bool, budget_s: float | None = None) -> None:
        self.progress = progress
        self.dry_run = dry_run
        self.deadline = None if budget_s is None else Deadline.after(budget_s)
        self._removed: dict[tuple[str, str], Swept] = {}
        self._kept: dict[tuple[str, str], Swept] = {}

    def removed(self, kind: Kind, name: str, why: str) -> None:
        """Add a removed object to the report. In a dry run, the object would be removed."""
        self._removed.setdefault((kind, name), Swept(kind=kind, id=name, why=why))

    def kept(self, kind: Kind, name: str, why: str, *, failed: bool = False) -> None:
        """Add an object that stays to the report. failed: whether an attempt to remove it failed."""
        self._kept.setdefault((kind, name), Swept(kind=kind, id=name, why=why, failed=failed))

    def backend(self, name: str) -> Backend | None:
        """Return the backend called *name*, or None if this version lacks it."""
        return create(name) if name in built() else None

    def report(self) -> SweepReport:
        """Return the report on all objects that were removed or kept."""
        return SweepReport(dry_run=self.dry_run, removed=tuple(self._removed.values()), kept=tuple(self._kept.values()))


def sweep(*, dry_run: bool, progress: Callable[[str], None], budget_s: float | None = None) -> SweepReport:
    """Remove what dead x07 processes left. Raises SandboxError if a folder of this tool cannot be used.

    budget_s: sweep only jobs, newest first, and begin no further job after this time. None: sweep everything.
    """
    sweeper = Sweeper(progress, dry_run=dry_run, budget_s=budget_s)
    if os.path.lexists(state_dir()):
        live = sweep_jobs(sweeper, _ALL if budget_s is None else _AT_START)
        if budget_s is None:
            _sweep_orphans(sweeper, live)
            _sweep_changes(sweeper)
            _sweep_leftovers(sweeper)
    return sweeper.report()


def sweep_jobs(sweeper: Sweeper, most: int) -> set[str]:
    """Check the *most* newest jobs, end those that may be ended, and return the names of live jobs.

    Raises SandboxError.
    """
    root = private_dir(state_dir())
    instance, now, live = runner_instance(root), here_and_now(), set()
    for name in unfinished_jobs(root, most):
        if sweeper.deadline is not None and sweeper.deadline.passed():
            break
        with locked_stored(root / name, instance) as stored:
            if stored is None or not _settled(sweeper, stored, now):
                live.add(name)
    return live


def _settled(sweeper: Sweeper, stored: StoredJob, now: Now) -> bool:
    """Sweep one job, whose folder the caller has locked. Return False if the job counts as live."""
    judgement = judge(stored, now)
    name = stored.folder.name
    if judgement.fate == "kept":
        if why := _why_unstarted(stored):
            if sweeper.dry_run or _remove_unstarted(stored.folder):
                sweeper.removed("unstarted", name, why)
            return True
        sweeper.kept("job", name, stored.why)
        return stored.standing != "unowned"
    if judgement.fate in {"live", "ended"}:
        return judgement.fate == "ended"
    if not sweeper.dry_run and (problem := _not_stopped(sweeper, stored)):
        sweeper.kept("job", name, f"{judgement.why}, and {problem}", failed=True)
    else:
        sweeper.removed("job", name, judgement.why)
    return True


def _not_stopped(sweeper: Sweeper, stored: StoredJob) -> str:
    """Stop a job by its record. Return why the job is not proven gone, or "" if it is."""
    assert stored.record is not None  # noqa: S101 - the job is ours
    backend = sweeper.backend(stored.record.backend)
    if backend is None:
        return f"this version has no backend {stored.record.backend!a}"
    try:
        return "" if backend.stop(stored.record) else "nothing proves that its processes are gone"
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
    run = runs_dir(state_dir()) / match[1]
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


def why_kept(labels: Mapping[str, str], *, instance: str, live: Collection[str], now_unix_ms: int) -> str:
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


def _runner_lives(labels: Mapping[str, str]) -> bool:
    """Whether a process has the pid in the run id of these labels. If so, the container stays."""
    match = _RUN_PID.match(labels.get("io.x07.run_id", ""))
    return match is not None and identify(int(match[1])) is not None


def _sweep_orphans(sweeper: Sweeper, live: Collection[str]) -> None:
    """Remove this tool's containers without a live job from every container engine. live: names of the live jobs."""
    instance = runner_instance(state_dir())
    for name in built():
        backend: object = sweeper.backend(name)
        if not isinstance(backend, HoldsInstances):
            continue
        try:
            for orphan in list(backend.orphans())[:_ORPHANS_MAX]:
                called = f"{name}:{orphan.id}"
                if problem := why_kept(orphan.labels, instance=instance, live=live, now_unix_ms=unix_ms()):
                    sweeper.kept("instance", called, problem)
                elif _runner_lives(orphan.labels):
                    why = "the x07 process that started it may be alive, with its record in another folder"
                    sweeper.kept("instance", called, why)
                elif sweeper.dry_run or backend.remove(orphan):
                    sweeper.removed("instance", called, "it has no record, and its deadline has passed")
                else:
                    sweeper.kept("instance", called, "it was removed, but still exists", failed=True)
        except SandboxError as exc:
            sweeper.kept("instance", name, f"{exc.what}: {exc.why}")


def _sweep_changes(sweeper: Sweeper) -> None:
    """Roll back or complete file changes that were interrupted."""
    from x07_sandbox.housekeeping.pruner import entries
    from x07_sandbox.runs.saved_changes import recover_all

    folder = runs_dir(state_dir()) / APPLYING
    before = {path.name for path in entries(folder) if RUN_NAME.fullmatch(path.name)}
    if not sweeper.dry_run:
        recover_all(sweeper.progress)
    left = {path.name for path in entries(folder)} if not sweeper.dry_run else set()
    for run in sorted(before):
        if run in left:
            sweeper.kept("changes", run, "its changes are being applied, or cannot be recovered yet")
        else:
            sweeper.removed("changes", run, "its changes were applied incompletely")


def _sweep_leftovers(sweeper: Sweeper) -> None:
    """Remove expired folders, saved VMs without an image, and control groups of dead x07 processes."""
    from x07_sandbox.housekeeping.images import prune_saved
    from x07_sandbox.housekeeping.pruner import Pruner
    from x07_sandbox.housekeeping.records import prune_records
    from x07_sandbox.jail.cgroups import remove_abandoned_groups

    def name(path: str, kind: str) -> str:
        return Path(path).name if kind in {"job", "run"} else path

    pruner = Pruner(sweeper.progress, dry_run=sweeper.dry_run)
    prune_records(pruner)
    prune_saved(pruner, set())
    report = pruner.report()
    for gone in report.removed:  # pruning only removes records of jobs
        kind = cast("Kind", "record" if gone.kind == "job" else gone.kind)
        sweeper.removed(kind, name(gone.path, gone.kind), gone.why)
    for kept in report.kept:
        sweeper.kept(cast("Kind", kept.kind), name(kept.path, kept.kind), kept.why, failed=kept.failed)
    if not sweeper.dry_run:
        remove_abandoned_groups()
