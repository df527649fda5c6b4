"""Ending a run from any process, by the records of its jobs."""

import contextlib
import os
import time
from typing import Final, Literal

import msgspec

from x07_sandbox.backends.base import HoldsInstances
from x07_sandbox.backends.registry import BY_NAME, create
from x07_sandbox.errors import Command, HostError
from x07_sandbox.host.clocks import Deadline
from x07_sandbox.host.locks import is_locked
from x07_sandbox.host.paths import closing_fd, state_dir
from x07_sandbox.housekeeping.listing import run_folder
from x07_sandbox.records.active import JOB_NAME, unfinished_jobs
from x07_sandbox.records.reader import StoredJob, read_stored
from x07_sandbox.records.record import runner_instance
from x07_sandbox.records.stop_rules import here_and_now, state_of
from x07_sandbox.sessions.folder import KILL

_GONE_S: Final = 30.0
_ASKED_S: Final = 5.0  # for the run's x07 process to end the run itself
_LOOK_AGAIN_S: Final = 0.02
_ALL: Final = 1 << 30


class KillReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run that has ended. jobs_ended: the number of jobs that this command ended; 0 if it had none in progress."""

    schema_version: Literal["x07.sandbox.kill@0.1.0"] = "x07.sandbox.kill@0.1.0"
    run: str
    jobs_ended: int


def kill_run(run: str) -> tuple[bool, int]:
    """End a run. Return whether the run was in progress, and how many jobs were ended.

    The x07 process that started the run is asked to cancel it. That process is not signalled, since it may be any
    program that uses the library. If it does not do so soon, or is dead, the run's jobs are ended from here. Jobs that
    it starts meanwhile (a retry, the next phase) are ended too. Raises HostError if the run does not end.
    """
    deadline, ended = Deadline.after(_GONE_S), set[str]()
    asked = _ask(run)
    alone_until = Deadline.after(_ASKED_S if asked else 0)
    while True:
        jobs = _open_jobs(run)
        if not is_locked(run_folder(run)):
            if not jobs:
                return asked or bool(ended), len(ended)
            if all(stored.record is None for stored in jobs):  # this user may not end these jobs
                raise _not_ended(run, jobs)
        if asked and not alone_until.passed():
            ended.update(stored.folder.name for stored in jobs)
        else:
            ended.update(stored.folder.name for stored in jobs if _stopped(stored))
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


def _open_jobs(run: str) -> list[StoredJob]:
    root = state_dir()
    names = [name for name in unfinished_jobs(root, _ALL) if (match := JOB_NAME.fullmatch(name)) and match[1] == run]
    if not names:
        return []
    instance = runner_instance(root)
    return [stored for name in names if (stored := read_stored(root / name, instance)) is not None]


def _stopped(stored: StoredJob) -> bool:
    """Stop one job, unless it is about to start. Return whether its machine is proven gone."""
    record = stored.record
    if record is None or record.backend not in BY_NAME:
        return False
    backend = create(record.backend)
    if not isinstance(backend, HoldsInstances) and state_of(stored, here_and_now()) == "starting":
        return False
    return backend.stop(record)


def _not_ended(run: str, jobs: list[StoredJob]) -> HostError:
    what = f"cannot end run {run}"
    unclear = [stored for stored in jobs if stored.record is None]
    if unclear:
        why = f"the state of its job {unclear[0].folder.name} is not known ({unclear[0].why})"
        return HostError(what, why, f"Run x07 inspect {run}, or x07 sweep")
    pid = run.split("-")[1]
    if not jobs:
        return HostError(
            what,
            "it has no job now, because it is waiting or copying files",
            ("End its process: ", Command(f"kill {pid}")),
        )
    fix = ("End its process and remove what it leaves: ", Command(f"kill {pid}; x07 sweep"))
    return HostError(what, "its job does not end", fix)
