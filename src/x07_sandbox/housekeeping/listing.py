"""What runs and jobs there are: for `x07 ps` and `x07 inspect`. Only reads."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from x07_sandbox.errors import UsageError
from x07_sandbox.host import settings
from x07_sandbox.host.decoding import prepared
from x07_sandbox.host.locks import is_locked
from x07_sandbox.host.paths import read_bounded, state_dir
from x07_sandbox.housekeeping.lookup import run_folder
from x07_sandbox.jobs.active import JOB_NAME
from x07_sandbox.jobs.reader import StoredJob, all_stored
from x07_sandbox.jobs.stop_rules import here_and_now, judge, overdue_ms, state_of
from x07_sandbox.runs.folder import REQUEST, RUN_NAME, runs_dir

if TYPE_CHECKING:
    from x07_sandbox.host.processes import Identity
    from x07_sandbox.jobs.stop_rules import Now

_LIVE: Final = frozenset({"starting", "running", "ending", "orphaned", "expired"})
_RESULT_MAX: Final = settings.GIB
_REQUEST_MAX: Final = 64 * settings.KIB
_WAITING_MAX: Final = 512  # runs that are looked at for whether they are under way: the newest


class JobLine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One job.

    state: starting, running, ending, orphaned (its runner is dead), expired, done, reaped; waiting for a run that has
    no job now; unowned, foreign, newer or damaged for a record that is not ours to judge. why: of that state.
    left_s: until its deadline, negative after it; null where it has ended or that is not known.
    program: what the run was asked to run; null where it was a text, or is not known.
    """

    run: str
    job_id: str
    phase: str
    backend: str
    state: str
    why: str
    created_unix_ms: int
    deadline_unix_ms: int
    left_s: float | None
    program: str | None
    labels: dict[str, str]


class PsReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `x07 ps --json` prints, oldest first."""

    schema_version: Literal["x07.sandbox.ps@0.1.0"] = "x07.sandbox.ps@0.1.0"
    jobs: tuple[JobLine, ...]


class RecordReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A job's job.json."""

    schema_version: str
    run_id: str
    backend: str
    container_id: str
    pid: int | None
    created_unix_ms: int
    deadline_unix_ms: int
    grace_ms: int
    cleanup_ms: int


class ProcessReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One process of one boot. start_ticks: when it started, in clock ticks since boot (proc(5), stat)."""

    pid: int
    start_ticks: int


class OwnerReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who runs a job, and what was started for it."""

    boot_id: str
    pid_namespace: str
    runner: ProcessReport
    processes: dict[str, ProcessReport]
    cgroups: tuple[str, ...]


class JobReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One job of a run. record: its job.json; owner: of its owner.json. Null where there is none that can be read."""

    job_id: str
    state: str
    why: str
    folder: str
    record: RecordReport | None
    labels: dict[str, str]
    owner: OwnerReport | None


class _Ending(msgspec.Struct, frozen=True, kw_only=True):
    """As it is read: from among the result's other fields."""

    outcome: str
    fault: str
    reason: str
    x07_exit_code: int
    exit_code: int | None = None
    signal: int | None = None
    isolation: str | None = None
    backend: str | None = None


class ResultSummary(_Ending, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The part of a run's result.json that says how it ended."""


class InspectReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `x07 inspect RUN` prints. live: whether the run is under way. paths: what there is of it, by what it is."""

    schema_version: Literal["x07.sandbox.inspect@0.1.0"] = "x07.sandbox.inspect@0.1.0"
    run: str
    live: bool
    program: str | None
    jobs: tuple[JobReport, ...]
    result: ResultSummary | None
    paths: dict[str, str]


class _Request(msgspec.Struct, frozen=True):
    program: str | None = None


def list_jobs(*, everything: bool = False) -> PsReport:
    """The live jobs of this user; with *everything* also those that ended, and records that are not ours."""
    now = here_and_now()
    lines = [_line(stored, now) for stored in all_stored()]
    jobs = [line for line in lines if everything or line.state in _LIVE]
    busy = {line.run for line in jobs if line.state in _LIVE}
    waiting = [_waiting(run) for run in _newest_runs() if run not in busy and is_locked(run_folder(run))]
    return PsReport(jobs=tuple(sorted([*jobs, *waiting], key=lambda line: (line.created_unix_ms, line.job_id))))


def _line(stored: StoredJob, now: Now) -> JobLine:
    match, job = JOB_NAME.fullmatch(stored.folder.name), stored.job
    open_end = stored.ended is None and stored.record is not None
    return JobLine(
        run=stored.run,
        job_id=stored.folder.name,
        phase=match[4] if match else "",
        backend=job.backend if job is not None else "",
        state=state_of(stored, now),
        why=judge(stored, now).why,
        created_unix_ms=job.created_unix_ms if job is not None else int(stored.run.partition("-")[0]),
        deadline_unix_ms=job.deadline_unix_ms if job is not None else 0,
        left_s=-overdue_ms(stored, now) / 1000 if open_end else None,
        program=_program(stored.run),
        labels=_labels(stored),
    )


def _waiting(run: str) -> JobLine:
    """A run under way that has no job now: it waits for its turn, or copies files."""
    return JobLine(
        run=run,
        job_id=run,
        phase="",
        backend="",
        state="waiting",
        why="it has no job now: it prepares one, waits for its turn, or settles changes to files",
        created_unix_ms=int(run.partition("-")[0]),
        deadline_unix_ms=0,
        left_s=None,
        program=_program(run),
        labels={},
    )


def _labels(stored: StoredJob) -> dict[str, str]:
    """Those of its record; labels of others are shown only under our own prefix."""
    return {} if stored.record is None else stored.record.labels()


def _newest_runs() -> list[str]:
    try:
        names = [name for name in os.listdir(runs_dir(state_dir())) if RUN_NAME.fullmatch(name)]  # noqa: PTH208
    except FileNotFoundError:
        return []
    return sorted(names, reverse=True)[:_WAITING_MAX]


def _program(run: str) -> str | None:
    with contextlib.suppress(UsageError, msgspec.MsgspecError, RecursionError):
        data = read_bounded(run_folder(run) / REQUEST, "request", _REQUEST_MAX)
        return msgspec.json.decode(data, type=prepared(_Request)).program
    return None


def inspect_run(run: str) -> InspectReport:
    """All about one run, by its full name."""
    now, folder = here_and_now(), run_folder(run)
    jobs = [stored for stored in all_stored() if stored.run == run]
    names = sorted(os.listdir(folder)) if folder.is_dir() else []  # noqa: PTH208 - names are wanted
    return InspectReport(
        run=run,
        live=is_locked(folder),
        program=_program(run),
        jobs=tuple(_job(stored, now) for stored in jobs),
        result=_result(run),
        paths={"folder": str(folder)} | {name: str(folder / name) for name in names},
    )


def _job(stored: StoredJob, now: Now) -> JobReport:
    owner = stored.owner
    return JobReport(
        job_id=stored.folder.name,
        state=state_of(stored, now),
        why=judge(stored, now).why,
        folder=str(stored.folder),
        record=None if stored.job is None else RecordReport(**msgspec.structs.asdict(stored.job)),
        labels=_labels(stored),
        # Without the job's mark: a process that carries it among its arguments is taken for one of the job's.
        owner=None
        if owner is None
        else OwnerReport(
            boot_id=owner.boot_id,
            pid_namespace=owner.pid_namespace,
            runner=_process(owner.runner),
            processes={name: _process(identity) for name, identity in owner.processes.items()},
            cgroups=owner.cgroups,
        ),
    )


def _process(identity: Identity) -> ProcessReport:
    return ProcessReport(pid=identity.pid, start_ticks=identity.start_ticks)


def _result(run: str) -> ResultSummary | None:
    with contextlib.suppress(UsageError, msgspec.MsgspecError, RecursionError):
        data = read_bounded(run_folder(run) / "result.json", "result", _RESULT_MAX)
        ending = msgspec.json.decode(data, type=prepared(_Ending))
        return ResultSummary(**msgspec.structs.asdict(ending))
    return None
