"""Stop a job by its record, from any process; and which jobs of this user are not recorded as gone."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Final

from x07_sandbox.host import settings
from x07_sandbox.host.clocks import Deadline, boot_ms
from x07_sandbox.host.processes import (
    boot_id,
    is_alive,
    kill_identity,
    pid_namespace,
    processes_with_mark,
    sees_every_process,
    wait_gone,
)
from x07_sandbox.jobs.reader import all_stored, read_stored
from x07_sandbox.jobs.record import mark_reaped

if TYPE_CHECKING:
    from collections.abc import Callable

    from x07_sandbox.host.processes import Identity
    from x07_sandbox.jobs.reader import StoredJob
    from x07_sandbox.jobs.record import JobRecord

_GONE_S: Final = 10.0
_GRACE_S: Final = 2.0


def live_records(backend: str) -> list[JobRecord]:
    """Jobs of this user and of one backend that were started and are not recorded as gone, oldest first."""
    records = [stored.record for stored in all_stored() if stored.ended is None and stored.record is not None]
    return sorted((one for one in records if one.backend == backend), key=lambda record: record.created_unix_ms)


def stop_recorded(
    record: JobRecord, remove: Callable[[StoredJob], bool] = lambda _stored: True, *, signals: bool = True
) -> bool:
    """Stop the processes of a job: ask, kill, verify, remove, record; whether it is proven gone. Safe to call again.

    A process is signalled only if its number, start time, boot and our random mark agree.
    remove: removes what outlives the processes (control groups, folders), and returns whether that is gone.
    signals: whether its processes are ours to end; those of a container are its engine's.
    Raises HostError where the job's end cannot be recorded.
    """
    stored = read_stored(record.folder, record.runner_instance)
    if stored is None:
        return True  # its record was removed, as only that of a job that is gone is
    if stored.ended is not None:
        return True
    if stored.owner is None or stored.record is None or stored.record.mark != record.mark:
        return False
    if not ((not signals or _processes_gone(stored, record)) and remove(stored)):
        return False
    mark_reaped(record)
    return True


def _processes_gone(stored: StoredJob, record: JobRecord) -> bool:
    """End the job's processes; whether they are proven gone."""
    owner = stored.owner
    assert owner is not None  # noqa: S101 - the caller has looked
    if owner.boot_id != boot_id():
        return True
    processes = list(owner.processes.values())
    if owner.pid_namespace != pid_namespace():
        # Its numbers mean nothing here. Its supervisor ends it at the deadline; a day later that was long ago.
        overdue_ms = boot_ms() - record.deadline_boot_ms if record.deadline_boot_ms else 0
        if not sees_every_process() and overdue_ms < settings.DAY_S * 1000:
            return False
        processes = []
    # A runner that was killed before it wrote down what it had started leaves processes that only the mark tells.
    return _ended(processes or processes_with_mark(record.mark), record.mark)


def _ended(processes: list[Identity], mark: str) -> bool:
    deadline, signalled = Deadline.after(_GONE_S), False
    for identity in processes:  # the supervisor first: it ends all of the jail
        if kill_identity(identity, mark, signal.SIGTERM):
            signalled = True
            wait_gone(identity, min(_GRACE_S, deadline.left_s()))
    for identity in processes:
        signalled |= kill_identity(identity, mark)
    # A live process without the mark is left alone, and may be the job's: then the job is not proven gone.
    left_s = deadline.left_s if signalled else lambda: 0.0
    return all(wait_gone(one, left_s()) or not is_alive(one) for one in processes)
