"""Jobs by their records, from any process: which are not recorded as gone, and stopping one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path
from typing import Any, Final

from x07_sandbox.errors import UsageError
from x07_sandbox.host.clocks import Deadline
from x07_sandbox.host.paths import read_bounded, state_dir
from x07_sandbox.host.processes import Identity, boot_id, is_alive, kill_identity, pid_namespace, wait_gone
from x07_sandbox.jobs.record import OWNER_SCHEMA, JobRecord, mark_done

_RECORD_MAX: Final = 64 * 1024
_GONE_S: Final = 10.0
_GRACE_S: Final = 2.0


def live_records(backend: str) -> list[JobRecord]:
    """Jobs of this user and of one backend that were started and are not recorded as gone, oldest first."""
    try:
        folders = [Path(entry.path) for entry in os.scandir(state_dir()) if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    records = [read_record(folder) for folder in folders if not (folder / "done").exists()]
    found = [record for record in records if record is not None and record.backend == backend]
    return sorted(found, key=lambda record: record.created_unix_ms)


def read_record(folder: Path) -> JobRecord | None:
    """The record of a job in its folder; None where it is not ours, or cannot be read."""
    job, owner = _read(folder / "job.json"), _read(folder / "owner.json")
    if job is None or owner is None or owner.get("schema_version") != OWNER_SCHEMA:
        return None
    try:
        return JobRecord(
            job_id=str(job["run_id"]),
            run_id=str(owner["run"]),
            backend=str(job["backend"]),
            folder=folder,
            created_unix_ms=int(job["created_unix_ms"]),
            deadline_unix_ms=int(job["deadline_unix_ms"]),
            grace_ms=int(job["grace_ms"]),
            mark=str(owner["instance"]),
            runner_instance=str(owner["labels"]["io.x07.runner_instance"]),
            image_digest=str(owner["labels"]["io.x07.image_digest"]),
        )
    except (KeyError, TypeError, ValueError):
        return None


def stop_recorded(record: JobRecord) -> bool:
    """Stop the processes of a job: ask, kill, verify, record; whether they are proven gone. Safe to call again.

    A process is signalled only if its number, start time, boot and our random mark agree.
    """
    if (record.folder / "done").exists():
        return True
    owner = _read(record.folder / "owner.json")
    if owner is None:
        return False
    if owner.get("boot_id") == boot_id():
        if owner.get("pid_namespace") != pid_namespace():
            return False  # its numbers mean nothing here
        processes = [Identity(**values) for values in dict(owner.get("processes", {})).values()]
        deadline = Deadline.after(_GONE_S)
        for identity in processes:  # the supervisor first: it ends all of the jail
            kill_identity(identity, record.mark, signal.SIGTERM)
            wait_gone(identity, min(_GRACE_S, deadline.left_s()))
        for identity in processes:
            kill_identity(identity, record.mark)
        if not all(wait_gone(identity, deadline.left_s()) or not is_alive(identity) for identity in processes):
            return False
    if record.folder.is_dir():
        mark_done(record)
    return True


def _read(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(UsageError, OSError, ValueError, RecursionError):
        found = json.loads(read_bounded(path, "record", _RECORD_MAX))
        return found if isinstance(found, dict) else None
    return None
