"""Stopping a job by its record, from any process."""

import signal
from collections.abc import Callable
from typing import Final

from x07_sandbox.host import settings
from x07_sandbox.host.clocks import Deadline
from x07_sandbox.host.linux import boot_id, boot_ms, pid_namespace, sees_every_process
from x07_sandbox.host.processes import Identity, is_alive, kill_identity, processes_with_mark, wait_gone
from x07_sandbox.records.reader import StoredJob, all_stored, read_stored
from x07_sandbox.records.record import JobRecord, mark_reaped

_GONE_S: Final = 10.0
_GRACE_S: Final = 2.0


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
    assert owner is not None  # noqa: S101 - checked by the caller
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
