"""Sweep: end and remove what dead runners left, and never touch anything else.

Removed are jobs of ours whose owner is provably dead or whose deadline has passed (jobs/stop_rules), folders of jobs
that never started, instances of ours without a record (housekeeping/orphans), half-applied file changes, folders past
their retention, and templates that no image needs. Everything else stays and is reported.

Any number of sweeps and runners may work at once: a sweep acts on a job only under a lock on its folder, which it never
waits for, and judges the job again under it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from x07_sandbox.backends.registry import built, create
from x07_sandbox.errors import SandboxError
from x07_sandbox.host.clocks import Deadline
from x07_sandbox.host.paths import private_dir, state_dir
from x07_sandbox.housekeeping.unstarted import remove_unstarted, why_unstarted
from x07_sandbox.jobs.active import unfinished_jobs
from x07_sandbox.jobs.reader import locked_stored
from x07_sandbox.jobs.record import runner_instance
from x07_sandbox.jobs.stop_rules import here_and_now, judge

if TYPE_CHECKING:
    from collections.abc import Callable

    from x07_sandbox.backends.base import Backend
    from x07_sandbox.jobs.reader import StoredJob
    from x07_sandbox.jobs.stop_rules import Now

SCHEMA: Final = "x07.sandbox.sweep@0.1.0"
# job: ended, its instance and files removed, and recorded as reaped. unstarted: the folder of a job that never began.
# instance: one that only an engine knew. changes: files changed by halves, put right. record, run: folders past
# retention. template, leftover: as `x07 prune` has them.
Kind = Literal["job", "unstarted", "instance", "changes", "record", "run", "template", "leftover"]
_AT_START: Final = 512  # jobs: the newest, so that a start costs no more where thousands of records lie
_ALL: Final = 1 << 30


class Swept(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One thing that was removed, or stays, and why. id: a job's or run's name, an engine's, or a path.

    failed: it was to go, and that failed.
    """

    kind: Kind
    id: str
    why: str
    failed: bool = False


class SweepReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `x07 sweep --json` prints. dry_run: nothing was removed."""

    schema_version: Literal["x07.sandbox.sweep@0.1.0"] = SCHEMA
    dry_run: bool
    removed: tuple[Swept, ...]
    kept: tuple[Swept, ...]


class Sweeper:
    """One sweep: what it may do, and what it has done."""

    def __init__(self, progress: Callable[[str], None], *, dry_run: bool, budget_s: float | None = None) -> None:
        self.progress = progress
        self.dry_run = dry_run
        self._deadline = None if budget_s is None else Deadline.after(budget_s)
        self._removed: dict[tuple[str, str], Swept] = {}
        self._kept: dict[tuple[str, str], Swept] = {}
        self._backends: dict[str, Backend] = {}

    def removed(self, kind: Kind, name: str, why: str) -> None:
        """Note that something went, or would go."""
        self._removed.setdefault((kind, name), Swept(kind=kind, id=name, why=why))

    def kept(self, kind: Kind, name: str, why: str, *, failed: bool = False) -> None:
        """Note that something stays. failed: it was to go."""
        self._kept.setdefault((kind, name), Swept(kind=kind, id=name, why=why, failed=failed))

    def over(self) -> bool:
        """Whether its time is up."""
        return self._deadline is not None and self._deadline.passed()

    def backend(self, name: str) -> Backend | None:
        """The backend of that name; None where this version does not have it."""
        if name not in self._backends and name in built():
            self._backends[name] = create(name)
        return self._backends.get(name)

    def report(self) -> SweepReport:
        """All that was done."""
        return SweepReport(dry_run=self.dry_run, removed=tuple(self._removed.values()), kept=tuple(self._kept.values()))


def sweep(*, dry_run: bool, progress: Callable[[str], None], budget_s: float | None = None) -> SweepReport:
    """Remove what dead runners left. Raises SandboxError if a folder of ours cannot be used at all.

    budget_s: look only at jobs, the newest first, and begin with no other after that time; None: do all of it.
    """
    sweeper = Sweeper(progress, dry_run=dry_run, budget_s=budget_s)
    if os.path.lexists(state_dir()):
        live = sweep_jobs(sweeper, _ALL if budget_s is None else _AT_START)
        if budget_s is None:
            from x07_sandbox.housekeeping.orphans import sweep_orphans
            from x07_sandbox.housekeeping.sweep_leftovers import sweep_leftovers

            sweep_orphans(sweeper, live)
            sweep_leftovers(sweeper)
    return sweeper.report()


def sweep_jobs(sweeper: Sweeper, most: int) -> set[str]:
    """End every job that may go; the names of those that live. Raises SandboxError."""
    root = private_dir(state_dir())
    instance, now, live = runner_instance(root), here_and_now(), set()
    for name in unfinished_jobs(root, most):
        if sweeper.over():
            break
        with locked_stored(root / name, instance) as stored:
            if stored is None or not _settled(sweeper, stored, now):
                live.add(name)
    return live


def _settled(sweeper: Sweeper, stored: StoredJob, now: Now) -> bool:
    """Do with one job, whose folder is locked, what may be done; whether it is surely none that lives."""
    judgement = judge(stored, now)
    name = stored.folder.name
    if judgement.fate == "kept":
        if why := why_unstarted(stored):
            if sweeper.dry_run or remove_unstarted(stored.folder):
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
    """Stop a job by its record; why it is not proven gone, empty where it is."""
    assert stored.record is not None  # noqa: S101 - only what is ours is ever stopped
    backend = sweeper.backend(stored.record.backend)
    if backend is None:
        return f"this version has no backend {stored.record.backend!a}"
    try:
        return "" if backend.stop(stored.record) else "nothing proves that its processes are gone"
    except SandboxError as exc:
        return f"it cannot be stopped: {exc.what}: {exc.why}"
    except OSError as exc:  # one job must not keep a sweep from all others
        return f"it cannot be stopped: {exc.strerror or exc}"
