"""Stopping jobs by their records, from any process: one job, or all jobs of a run."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal, Protocol, runtime_checkable

import msgspec

from x07_sandbox.errors import Command, HostError
from x07_sandbox.host import settings
from x07_sandbox.host.linux import boot_id, boot_ms, pid_namespace, sees_every_process
from x07_sandbox.host.locks import is_locked
from x07_sandbox.host.paths import closing_fd
from x07_sandbox.host.processes import Identity, is_alive, kill_identity, processes_with_mark, wait_gone
from x07_sandbox.host.waiting import Deadline
from x07_sandbox.records.reader import StoredJob, all_stored, here_and_now, open_stored, read_stored, state_of
from x07_sandbox.records.runs import KILL, JobRecord, mark_reaped, run_folder

_GONE_S: Final = 10.0
_GRACE_S: Final = 2.0
_RUN_GONE_S: Final = 30.0
_ASKED_S: Final = 5.0  # for the run's x07 process to end the run itself
_LOOK_AGAIN_S: Final = 0.02


class Stops(Protocol):
    """The part of a backend that stops jobs."""

    def stop(self, record: JobRecord) -> bool:
        """Stop a job from any process. Return whether it is proven and recorded as gone. Raises SandboxError."""


class Orphan(msgspec.Struct, frozen=True, kw_only=True):
    """An instance in a container engine. id: the engine's name for it. labels: as the engine reports them."""

    id: str
    labels: Mapping[str, str]


@runtime_checkable
class HoldsInstances(Protocol):
    """A backend whose instances belong to a daemon or engine, and so can outlive their record."""

    def orphans(self) -> Sequence[Orphan]:
        """Return the instances with x07's labels, which anybody can set (records/sweep). Raises SandboxError."""

    def remove(self, orphan: Orphan) -> bool:
        """Remove an instance that `orphans` returned, and return whether it is proven gone. Raises SandboxError."""


# Returns the backend with a name, or None if this version has no such backend.
FindBackend = Callable[[str], Stops | None]


class KillReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run that has ended. jobs_ended: the number of jobs that this command ended; 0 if it had none in progress."""

    schema_version: Literal["x07.sandbox.kill@0.1.0"] = "x07.sandbox.kill@0.1.0"
    run: str
    jobs_ended: int


def live_records(backend: str) -> list[JobRecord]:
    """Return the records of this user's jobs on one backend that are not recorded as gone, oldest first."""
    records = [stored.record for stored in all_stored() if stored.ended is None and stored.record is not None]
    return sorted((one for one in records if one.backend == backend), key=lambda record: record.created_unix_ms)


def stop_recorded(
    record: JobRecord, remove: Callable[[StoredJob], bool] = lambda _stored: True, *, signals: bool = True
) -> bool:
    """Stop a recorded job. Return whether the job is proven gone and, if so, record this. May be called again.

    A process is signalled only if its pid, start time, boot and random mark match the record. Raises HostError if the
    job's end cannot be recorded.
    remove: removes control groups and folders that outlive the processes; returns whether all of these are gone.
    signals: whether this process may signal the job's processes. A container's processes belong to its engine.
    """
    stored = read_stored(record.folder, record.runner_instance)
    if stored is None or stored.ended is not None:  # a record is removed only once its job is gone
        return True
    if stored.owner is None or stored.record is None or stored.record.mark != record.mark:
        return False
    if not ((not signals or _processes_gone(stored, record)) and remove(stored)):
        return False
    mark_reaped(record)
    return True


def _processes_gone(stored: StoredJob, record: JobRecord) -> bool:
    """End the job's processes and return whether they are proven gone."""
    owner = stored.owner
    assert owner is not None  # checked by the caller
    if owner.boot_id != boot_id():
        return True
    processes = list(owner.processes.values())
    if owner.pid_namespace != pid_namespace():
        # The job's pids mean nothing here. A day after the deadline, the job's supervisor has surely ended the job.
        if not sees_every_process() and boot_ms() - record.deadline_boot_ms < settings.DAY_S * 1000:
            return False
        processes = []
    # If the job's x07 process was killed before it recorded the other processes, only the random mark finds them.
    return _ended(processes or processes_with_mark(record.mark), record.mark)


def _ended(processes: list[Identity], mark: str) -> bool:
    deadline, signalled = Deadline.after(_GONE_S), False
    for identity in processes:  # the supervisor first: it ends the whole jail
        if kill_identity(identity, mark, signal.SIGTERM):
            signalled = True
            wait_gone(identity, min(_GRACE_S, deadline.left_s()))
    for identity in processes:
        signalled |= kill_identity(identity, mark)
    # A live process without the mark is not signalled. It may belong to the job, so the job is not proven gone. But a
    # process that is ending shows no mark for its last moments.
    deadline = deadline if signalled else Deadline.after(_GRACE_S)
    return all(wait_gone(one, deadline.left_s()) or not is_alive(one) for one in processes)


def kill_run(run: str, find: FindBackend) -> tuple[bool, int]:
    """End a run. Return whether the run was in progress, and how many jobs were ended.

    The x07 process that started the run is asked to cancel it. That process is not signalled, since it may be any
    program that uses the library. If it does not do so soon, or is dead, the run's jobs are ended from here. Jobs that
    it starts meanwhile (a retry, the next phase) are ended too. Raises HostError if the run does not end.
    """
    deadline, ended = Deadline.after(_RUN_GONE_S), set[str]()
    asked = _ask(run)
    alone_until = Deadline.after(_ASKED_S if asked else 0)
    while True:
        jobs = open_stored(run)
        if not is_locked(run_folder(run)):
            if not jobs:
                return asked or bool(ended), len(ended)
            if all(stored.record is None for stored in jobs):  # this user may not end these jobs
                raise _not_ended(run, jobs)
        if asked and not alone_until.passed():
            ended.update(stored.folder.name for stored in jobs)
        else:
            ended.update(stored.folder.name for stored in jobs if _stopped(stored, find))
        if deadline.passed():
            raise _not_ended(run, jobs)
        time.sleep(_LOOK_AGAIN_S)  # there is no event for another process's next job


def _ask(run: str) -> bool:
    """Ask the run's x07 process to cancel the run. Return whether there is such a process."""
    with contextlib.suppress(OSError):  # nobody reads the pipe, or there is none
        fd = os.open(run_folder(run) / KILL, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        with closing_fd(fd):
            return os.write(fd, b"k") == 1
    return False


def _stopped(stored: StoredJob, find: FindBackend) -> bool:
    """Stop one job, unless it is about to start. Return whether its machine is proven gone."""
    record = stored.record
    if record is None or (backend := find(record.backend)) is None:
        return False
    if not isinstance(backend, HoldsInstances) and state_of(stored, here_and_now()) == "starting":
        return False
    return backend.stop(record)


def _not_ended(run: str, jobs: list[StoredJob]) -> HostError:
    what, kill = f"cannot end run {run}", f"kill {run.split('-')[1]}"
    unclear = next((stored for stored in jobs if stored.record is None), None)
    if unclear is not None:
        why = f"the state of its job {unclear.folder.name} is not known ({unclear.why})"
        return HostError(what, why, f"Run x07 inspect {run}, or x07 sweep")
    if not jobs:
        why = "it has no job now, because it is waiting or copying files"
        return HostError(what, why, ("End its process: ", Command(kill)))
    fix = ("End its process and remove what it leaves: ", Command(f"{kill}; x07 sweep"))
    return HostError(what, "its job does not end", fix)
