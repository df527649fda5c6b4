"""Reports on runs and jobs, for `x07 ps`, `x07 inspect` and `x07 report`."""

import contextlib
import os
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeVar

import msgspec

from x07_sandbox.errors import UsageError
from x07_sandbox.host import settings
from x07_sandbox.host.documents import prepared
from x07_sandbox.host.locks import is_locked
from x07_sandbox.host.paths import read_bounded
from x07_sandbox.host.processes import Identity
from x07_sandbox.host.waiting import unix_ms
from x07_sandbox.records.reader import (
    JobDocument,
    Now,
    StoredJob,
    all_stored,
    here_and_now,
    judge,
    open_stored,
    overdue_ms,
    state_of,
)
from x07_sandbox.records.runs import JOB_NAME, KILL, REQUEST, record_in, run_folder, run_names, started_ms

_T = TypeVar("_T", bound=msgspec.Struct)
_LIVE: Final = frozenset({"starting", "running", "ending", "orphaned", "expired"})
_RESULT_MAX: Final = settings.GIB
_REQUEST_MAX: Final = 64 * settings.KIB
_WAITING_MAX: Final = 512  # the newest runs are checked for being in progress


class JobLine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One job, or one run without a job.

    state: starting, running, ending, orphaned (the x07 process that started it is dead), expired, done or reaped. A run
    without a job has the state waiting. A record that this user's x07 cannot use has the state unowned, foreign, newer
    or damaged. why: the reason for the state.
    left_s: seconds until the job's deadline, or until the lifetime of its sandbox ends; negative after it; null if the
    job has ended or the time is unknown.
    program: the requested program; null if it was given as source text or is unknown.
    sandbox: the name of the sandbox, empty if it has none; null for a run.
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
    sandbox: str | None
    labels: dict[str, str]


class PsReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The output of `x07 ps --json`. The oldest job comes first."""

    schema_version: Literal["x07.sandbox.ps@0.1.0"] = "x07.sandbox.ps@0.1.0"
    jobs: tuple[JobLine, ...]


class RecordReport(JobDocument, frozen=True, forbid_unknown_fields=True):
    """The content of a job's job.json."""


class OwnerReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The x07 process (runner) that started a job, and the job's other processes and control groups."""

    boot_id: str
    pid_namespace: str
    runner: Identity
    processes: dict[str, Identity]
    cgroups: tuple[str, ...]


class JobReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One job of a run. record: its job.json. owner: its owner.json. Null if a file cannot be read."""

    job_id: str
    state: str
    why: str
    folder: str
    record: RecordReport | None
    labels: dict[str, str]
    owner: OwnerReport | None


class _Ending(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of result.json that `ResultSummary` needs."""

    outcome: str
    fault: str
    reason: str
    x07_exit_code: int
    exit_code: int | None = None
    signal: int | None = None
    isolation: str | None = None
    backend: str | None = None


class ResultSummary(_Ending, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a run ended, from its result.json."""


class InspectReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The output of `x07 inspect RUN`. live: whether the run is in progress. paths: its folder and files, by name."""

    schema_version: Literal["x07.sandbox.inspect@0.1.0"] = "x07.sandbox.inspect@0.1.0"
    run: str
    live: bool
    program: str | None
    jobs: tuple[JobReport, ...]
    result: ResultSummary | None
    paths: dict[str, str]


class _Request(msgspec.Struct, frozen=True):
    program: str | None = None


class _Phase(msgspec.Struct, frozen=True):
    times_ms: dict[str, float]


class _Timed(msgspec.Struct, frozen=True):
    """The fields of result.json that `RecentRun` needs."""

    outcome: str
    phases: dict[str, _Phase]


class RecentRun(NamedTuple):
    """A run of the past. outcome: empty if there is no result. took_ms: the times of its phases together, or None."""

    run: str
    outcome: str
    live: bool
    took_ms: float | None
    program: str | None


def list_jobs(*, everything: bool = False) -> PsReport:
    """Return this user's live jobs. everything: also finished jobs, and records of other users or machines."""
    now = here_and_now()
    lines = [_line(stored, now) for stored in (all_stored() if everything else open_stored())]
    jobs = [line for line in lines if everything or line.state in _LIVE]
    busy = {line.run for line in jobs if line.state in _LIVE}
    newest = sorted(run_names(), reverse=True)[:_WAITING_MAX]
    waiting = [_waiting(run) for run in newest if run not in busy and is_locked(run_folder(run))]
    return PsReport(jobs=tuple(sorted([*jobs, *waiting], key=lambda line: (line.created_unix_ms, line.job_id))))


def _line(stored: StoredJob, now: Now) -> JobLine:
    match, job = JOB_NAME.fullmatch(stored.folder.name), stored.job
    sandbox = record_in(run_folder(stored.run))
    left_s = None
    if stored.ended is None and stored.record is not None:
        left_s = -overdue_ms(stored, now) / 1000
        left_s = left_s if sandbox is None else min(left_s, (sandbox.until_unix_ms - unix_ms()) / 1000)
    return JobLine(
        run=stored.run,
        job_id=stored.folder.name,
        phase=match[4] if match else "",
        backend=job.backend if job is not None else "",
        state=state_of(stored, now),
        why=judge(stored, now).why,
        created_unix_ms=job.created_unix_ms if job is not None else started_ms(stored.run),
        deadline_unix_ms=job.deadline_unix_ms if job is not None else 0,
        left_s=left_s,
        program=program_of(stored.run),
        sandbox=None if sandbox is None else sandbox.name,
        labels={} if stored.record is None else stored.record.labels(),
    )


def _waiting(run: str) -> JobLine:
    """Return the line for a run in progress that has no job."""
    return JobLine(
        run=run,
        job_id=run,
        phase="",
        backend="",
        state="waiting",
        why="it has no job now, because it is preparing one, waiting for a free slot, or applying changes to files",
        created_unix_ms=started_ms(run),
        deadline_unix_ms=0,
        left_s=None,
        program=program_of(run),
        sandbox=None,
        labels={},
    )


def program_of(run: str) -> str | None:
    """Return the program as it was given to a run, or None if it was given as text or is not known."""
    request = _read(run_folder(run) / REQUEST, _REQUEST_MAX, _Request)
    return None if request is None else request.program


def inspect_run(run: str) -> InspectReport:
    """Return the report on the run with the full id *run*."""
    now, folder = here_and_now(), run_folder(run)
    jobs = [stored for stored in all_stored() if stored.run == run]
    names = sorted({*os.listdir(folder)} - {KILL}) if folder.is_dir() else []  # noqa: PTH208 - names are wanted
    ending = _read(folder / "result.json", _RESULT_MAX, _Ending)
    return InspectReport(
        run=run,
        live=is_locked(folder),
        program=program_of(run),
        jobs=tuple(_job(stored, now) for stored in jobs),
        result=None if ending is None else ResultSummary(**msgspec.structs.asdict(ending)),
        paths={"folder": str(folder)} | {name: str(folder / name) for name in names},
    )


def _job(stored: StoredJob, now: Now) -> JobReport:
    owner, names = stored.owner, OwnerReport.__struct_fields__
    return JobReport(
        job_id=stored.folder.name,
        state=state_of(stored, now),
        why=judge(stored, now).why,
        folder=str(stored.folder),
        record=None if stored.job is None else RecordReport(**msgspec.structs.asdict(stored.job)),
        labels={} if stored.record is None else stored.record.labels(),
        # The job's random mark is left out: any process with the mark among its arguments would count as the job's.
        owner=None if owner is None else OwnerReport(**{name: getattr(owner, name) for name in names}),
    )


def recent_runs(most: int) -> list[RecentRun]:
    """Return the last *most* runs and sandboxes of this user, newest first."""
    return [_recent(run) for run in sorted(run_names(), key=started_ms, reverse=True)[:most]]


def _recent(run: str) -> RecentRun:
    folder = run_folder(run)
    result = _read(folder / "result.json", _RESULT_MAX, _Timed)
    ends = [] if result is None else [one.times_ms.get("end") for one in result.phases.values()]
    known = [end for end in ends if end is not None]
    return RecentRun(
        run=run,
        outcome="" if result is None else result.outcome,
        live=is_locked(folder),
        took_ms=sum(known) if known and len(known) == len(ends) else None,
        program=program_of(run),
    )


def _read(path: Path, max_bytes: int, kind: type[_T]) -> _T | None:
    with contextlib.suppress(UsageError, msgspec.MsgspecError, RecursionError):
        return msgspec.json.decode(read_bounded(path, "file", max_bytes), type=prepared(kind))
    return None
