"""The stored state of jobs: a job's record, its owner (the x07 process of the job), and whether the job has ended.

`judge` decides whether a process that did not start a job may end it.

Files are opened beneath the folder, without following links, and read up to a limit. Other users may have written
them, so all values are validated.
"""

import contextlib
import fcntl
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeVar

import msgspec

from x07_sandbox.host import linux, processes, settings
from x07_sandbox.host.documents import prepared
from x07_sandbox.host.paths import closing_fd, state_dir, why_not_ours
from x07_sandbox.host.processes import Identity
from x07_sandbox.records.runs import (
    ENDS,
    JOB_NAME,
    JOB_SCHEMA,
    OWNER_SCHEMA,
    Ended,
    JobRecord,
    job_names,
    runner_instance,
    unfinished_jobs,
)

# Whether this user's x07 may use a job's folder. ours: yes, owner.json names this user and machine. unowned: there is
# no owner.json, since the job was never started or belongs to X07's own tools.
Standing = Literal["ours", "unowned", "foreign", "newer", "damaged"]
_RECORD_MAX: Final = 64 * 1024
_FLAGS: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC

_Ms = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_Word = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")]
_Text = Annotated[str, msgspec.Meta(max_length=4096)]


class JobDocument(msgspec.Struct, frozen=True):
    """`job.json`: the format that the X07 language's own tools use."""

    schema_version: str
    run_id: _Word
    backend: _Word
    container_id: _Word
    created_unix_ms: _Ms
    deadline_unix_ms: _Ms
    grace_ms: _Ms
    cleanup_ms: _Ms
    pid: int | None = None


class Owner(msgspec.Struct, frozen=True):
    """`owner.json`: a job's x07 process, and its other processes once they exist. instance: see `JobRecord.mark`."""

    schema_version: str
    run: _Word
    instance: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}$")]
    boot_id: Annotated[str, msgspec.Meta(max_length=64)]
    pid_namespace: Annotated[str, msgspec.Meta(max_length=64)]
    runner: Identity
    processes: Annotated[dict[str, Identity], msgspec.Meta(max_length=16)]
    cgroups: Annotated[tuple[_Text, ...], msgspec.Meta(max_length=32)]
    labels: Annotated[dict[str, _Text], msgspec.Meta(max_length=64)]
    deadline_boot_ms: _Ms


class _Head(msgspec.Struct, frozen=True):
    schema_version: str


_D = TypeVar("_D", JobDocument, Owner)


class StoredJob(msgspec.Struct, frozen=True, kw_only=True):
    """The content of one job's folder. standing: `ours`, or the kind of folder that this user's x07 cannot use.

    why: the reason for the standing; empty if it is `ours`.
    ended, ended_info: name and stat of the file `done` or `reaped`, which exists if the job's machine is gone.
    job: the content of job.json, if it is valid. record, owner: set if the standing is `ours`.
    """

    folder: Path
    info: os.stat_result
    standing: Standing
    why: str = ""
    ended: Ended | None = None
    ended_info: os.stat_result | None = None
    job: JobDocument | None = None
    record: JobRecord | None = None
    owner: Owner | None = None

    @property
    def run(self) -> str:
        """The name of the job's run, from the folder's name."""
        return run_of_job(self.folder.name)


def run_of_job(job: str) -> str:
    """Return the name of a job's run."""
    match = JOB_NAME.fullmatch(job)
    return match[1] if match else job


class _UnreadableError(Exception):
    """A file of a job cannot be used. standing: the resulting value of `StoredJob.standing`."""

    def __init__(self, standing: Standing, why: str) -> None:
        super().__init__(why)
        self.standing = standing
        self.why = why


_JOB: Final = msgspec.json.Decoder(prepared(JobDocument))
_OWNER: Final = msgspec.json.Decoder(prepared(Owner))
_HEAD: Final = msgspec.json.Decoder(prepared(_Head))
_DAMAGES: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def read_stored(folder: Path, instance: str) -> StoredJob | None:
    """Read one job's folder, or return None if there is none. instance: this user's `runner_instance` id."""
    with _stored(folder, instance, lock=False) as stored:
        return stored


def locked_stored(folder: Path, instance: str) -> contextlib.AbstractContextManager[StoredJob | None]:
    """Read one job's folder under the sweep lock; yield None if another sweep has the lock or the folder is gone."""
    return _stored(folder, instance, lock=True)


@contextlib.contextmanager
def _stored(folder: Path, instance: str, *, lock: bool) -> Iterator[StoredJob | None]:
    with contextlib.ExitStack() as stack:
        found: StoredJob | None = None
        with contextlib.suppress(OSError):  # no such folder, or it is locked
            info = folder.lstat()
            if problem := why_not_ours(info, stat.S_ISDIR):
                found = StoredJob(folder=folder, info=info, standing="foreign", why=problem)
            else:
                try:
                    fd = os.open(folder, _FLAGS | os.O_DIRECTORY)
                except OSError as exc:
                    if not isinstance(exc, FileNotFoundError):
                        why = f"it cannot be read ({exc.strerror})"
                        found = StoredJob(folder=folder, info=info, standing="damaged", why=why)
                else:
                    stack.callback(os.close, fd)
                    if lock:
                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    found = _read(folder, fd, instance)
        yield found


def _read(folder: Path, fd: int, instance: str) -> StoredJob:
    known: dict[str, Any] = {"folder": folder, "info": os.fstat(fd)}
    for name in ENDS:
        if (end := _regular(fd, name)) is not None:
            known |= {"ended": name, "ended_info": end}
            break
    try:
        known["job"] = job = _decoded(fd, "job.json", _JOB, JOB_SCHEMA)
        owner = _decoded(fd, "owner.json", _OWNER, OWNER_SCHEMA)
        labelled = {name: owner.labels[f"io.x07.{name}"] for name in ("runner_instance", "image_digest")}
    except _UnreadableError as exc:
        return StoredJob(**known, standing=exc.standing, why=exc.why)
    except KeyError:
        return StoredJob(**known, standing="damaged", why="its owner.json is damaged")
    if labelled["runner_instance"] != instance:
        return StoredJob(**known, standing="foreign", why="it belongs to another user or host")
    record = JobRecord(
        job_id=job.run_id,
        run_id=owner.run,
        backend=job.backend,
        folder=folder,
        created_unix_ms=job.created_unix_ms,
        deadline_unix_ms=job.deadline_unix_ms,
        grace_ms=job.grace_ms,
        mark=owner.instance,
        deadline_boot_ms=owner.deadline_boot_ms,
        **labelled,
    )
    return StoredJob(**known, standing="ours", record=record, owner=owner)


def all_stored() -> list[StoredJob]:
    """Return all jobs of the state folder, sorted by name. Raises OSError, HostError."""
    return _read_all(job_names(state_dir()))


def open_stored(run: str = "") -> list[StoredJob]:
    """Return the jobs, of all runs or of one, that have not ended, sorted by name. Raises OSError, HostError."""
    return _read_all(name for name in unfinished_jobs(state_dir()) if not run or run_of_job(name) == run)


def _read_all(names: Iterable[str]) -> list[StoredJob]:
    """Read the records of jobs. Those of ended ones that were removed meanwhile are left out."""
    found = sorted(names)
    if not found:
        return []
    root = state_dir()
    instance = runner_instance(root)
    read = (read_stored(root / name, instance) for name in found)
    return [stored for stored in read if stored is not None]


def _regular(folder_fd: int, name: str) -> os.stat_result | None:
    try:
        info = os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
    except OSError:
        return None
    return None if why_not_ours(info, stat.S_ISREG) else info


def _decoded(folder_fd: int, name: str, decoder: msgspec.json.Decoder[_D], schema: str) -> _D:
    """Read the file *name* of a job's folder. Raises _UnreadableError, also if the file's version is not *schema*."""
    damaged = f"its {name} is damaged"
    try:
        fd = os.open(name, _FLAGS, dir_fd=folder_fd)
        with closing_fd(fd):
            data = None if why_not_ours(os.fstat(fd), stat.S_ISREG) else os.read(fd, _RECORD_MAX)
    except FileNotFoundError:
        data = None
    except OSError as exc:
        raise _UnreadableError("damaged", damaged) from exc
    if data is None:
        why = f"it has no usable {name}, because x07-sandbox did not create it or it is damaged"
        raise _UnreadableError("unowned", why)
    try:
        if (version := _HEAD.decode(data).schema_version) != schema:
            raise _UnreadableError("newer", f"its {name} has an unknown format: {ascii(version)[:80]}")
        return decoder.decode(data)
    except _DAMAGES as exc:
        raise _UnreadableError("damaged", damaged) from exc


# live: the job's x07 process may still need the job. dead: the job's x07 process is gone. expired: the job's deadline
# has passed. ended: the job is over. kept: this user's x07 cannot use the job's record.
Fate = Literal["live", "dead", "expired", "ended", "kept"]


class Now(NamedTuple):
    """The time, boot and pid namespace for which `judge` decides. alive: tells whether a process in it is alive."""

    boot_id: str
    pid_namespace: str
    boot_ms: int
    alive: Callable[[Identity], bool] = processes.is_alive


class Judgement(NamedTuple):
    """A decision about a job (*fate*), and the reason as a clause about the job."""

    fate: Fate
    why: str


def here_and_now() -> Now:
    """Return the current time, boot and pid namespace. Raises HostError if /proc does not show them."""
    return Now(linux.boot_id(), linux.pid_namespace(), linux.boot_ms())


def judge(stored: StoredJob, now: Now) -> Judgement:
    """Decide whether to end a job. A job whose x07 process is alive is never ended before its deadline."""
    if stored.ended is not None:
        return Judgement("ended", f"its folder contains the file {stored.ended}")
    owner, record = stored.owner, stored.record
    if owner is None or record is None or stored.job is None:
        return Judgement("kept", stored.why)
    if owner.boot_id != now.boot_id:
        return Judgement("dead", "this host was rebooted after the job started")
    # The runner's pid means nothing in another pid namespace, so only the deadline counts there.
    here = owner.pid_namespace == now.pid_namespace
    if here and not now.alive(owner.runner):
        return Judgement("dead", "the x07 process that started it is dead")
    allowed_ms = stored.job.grace_ms + settings.CLEANUP_MS
    if overdue_ms(stored, now) > allowed_ms:
        return Judgement("expired", f"its deadline passed {overdue_ms(stored, now) // 1000} s ago")
    return Judgement("live", f"the x07 process that started it is {'alive' if here else 'in another pid namespace'}")


def overdue_ms(stored: StoredJob, now: Now) -> int:
    """Return the milliseconds since a job's deadline, negative before it. The job must have started in this boot."""
    return 0 if stored.record is None else now.boot_ms - stored.record.deadline_boot_ms


def state_of(stored: StoredJob, now: Now) -> str:
    """Return the job's state as one word, for `x07 ps`."""
    fate = judge(stored, now).fate
    if fate in {"ended", "dead", "expired"}:
        return stored.ended or {"dead": "orphaned"}.get(fate, fate)
    owner = stored.owner
    if fate == "kept" or owner is None:
        return stored.standing
    if not owner.processes:
        return "starting"
    here = owner.pid_namespace == now.pid_namespace
    return "ending" if here and not any(map(now.alive, owner.processes.values())) else "running"
