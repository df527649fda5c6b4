"""The one reader of a job's folder: what it says, whose it is, and whether the job has ended.

Each file is opened beneath the folder, without following links, and read up to a bound. What it says is data from a
disk that others may have written to: numbers and texts are checked before anybody acts on them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec

from x07_sandbox.host.paths import state_dir, why_not_ours
from x07_sandbox.host.processes import Identity
from x07_sandbox.jobs.active import ENDS, JOB_NAME
from x07_sandbox.jobs.record import JOB_SCHEMA, OWNER_SCHEMA, JobRecord, runner_instance

# ours: by its owner.json. unowned: a job.json without one, or an empty folder: a job that was never started, or X07's.
Standing = Literal["ours", "unowned", "foreign", "newer", "damaged"]
Ended = Literal["done", "reaped"]
_RECORD_MAX: Final = 64 * 1024
_FLAGS: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC

_Ms = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_Word = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")]
_Text = Annotated[str, msgspec.Meta(max_length=4096)]


class _Process(msgspec.Struct, frozen=True):
    pid: Annotated[int, msgspec.Meta(ge=1, le=2**22)]
    start_ticks: Annotated[int, msgspec.Meta(ge=0, le=2**62)]

    def identity(self) -> Identity:
        return Identity(pid=self.pid, start_ticks=self.start_ticks)


class JobDocument(msgspec.Struct, frozen=True):
    """`job.json`: the format of X07's tools."""

    schema_version: str
    run_id: _Word
    backend: _Word
    container_id: _Word
    created_unix_ms: _Ms
    deadline_unix_ms: _Ms
    grace_ms: _Ms
    cleanup_ms: _Ms
    pid: int | None = None


class _OwnerDocument(msgspec.Struct, frozen=True):
    """`owner.json`. Without deadline_boot_ms an earlier version of ours wrote it."""

    schema_version: str
    run: _Word
    instance: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}$")]
    boot_id: Annotated[str, msgspec.Meta(max_length=64)]
    pid_namespace: Annotated[str, msgspec.Meta(max_length=64)]
    runner: _Process
    processes: Annotated[dict[str, _Process], msgspec.Meta(max_length=16)]
    cgroups: Annotated[tuple[_Text, ...], msgspec.Meta(max_length=32)]
    labels: Annotated[dict[str, _Text], msgspec.Meta(max_length=64)]
    deadline_boot_ms: _Ms = 0


class _Head(msgspec.Struct, frozen=True):
    schema_version: str


_D = TypeVar("_D", JobDocument, _OwnerDocument)


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """Who runs a job and what was started for it. processes: by name; empty before any was started."""

    boot_id: str
    pid_namespace: str
    runner: Identity
    processes: dict[str, Identity]
    cgroups: tuple[str, ...]
    labels: dict[str, str]


class StoredJob(msgspec.Struct, frozen=True, kw_only=True):
    """One job's folder as it was read.

    why: the reason for every standing but `ours`. ended: which file says that its instance is gone, since ended_info.
    job: its job.json, where that is sound. record, owner: where it is ours.
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
        """The run that it belongs to, by the folder's name."""
        match = JOB_NAME.fullmatch(self.folder.name)
        return match[1] if match else self.folder.name


class _UnreadableError(Exception):
    """A file that says nothing. standing: what that makes of the job."""

    def __init__(self, standing: Standing, why: str) -> None:
        super().__init__(why)
        self.standing = standing
        self.why = why


_JOB: Final = msgspec.json.Decoder(JobDocument)
_OWNER: Final = msgspec.json.Decoder(_OwnerDocument)
_HEAD: Final = msgspec.json.Decoder(_Head)
_DAMAGES: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def read_stored(folder: Path, instance: str) -> StoredJob | None:
    """Read one job's folder. instance: the id of this user's runner. None where there is no such folder."""
    opened = _opened(folder)
    if not isinstance(opened, int):
        return opened
    try:
        return _read(folder, opened, instance)
    finally:
        os.close(opened)


@contextlib.contextmanager
def locked_stored(folder: Path, instance: str) -> Iterator[StoredJob | None]:
    """Read one job's folder under a lock that a sweep holds while it acts on the job.

    None where another sweep has the lock, or there is no such folder any more.
    """
    opened = _opened(folder)
    if not isinstance(opened, int):
        yield opened
        return
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(opened)
        yield None
        return
    try:
        yield _read(folder, opened, instance)
    finally:
        os.close(opened)


def _opened(folder: Path) -> int | StoredJob | None:
    """A descriptor of a job's folder, or what is to be said of one that cannot be opened."""
    try:
        info = folder.lstat()
    except OSError:
        return None
    if problem := why_not_ours(info, stat.S_ISDIR):
        return StoredJob(folder=folder, info=info, standing="foreign", why=problem)
    try:
        return os.open(folder, _FLAGS | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    except OSError as exc:
        return StoredJob(folder=folder, info=info, standing="damaged", why=f"it cannot be read: {exc.strerror}")


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
        return StoredJob(**known, standing="foreign", why="it is of another runner")
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
    known["owner"] = Owner(
        boot_id=owner.boot_id,
        pid_namespace=owner.pid_namespace,
        runner=owner.runner.identity(),
        processes={name: process.identity() for name, process in owner.processes.items()},
        cgroups=owner.cgroups,
        labels=owner.labels,
    )
    return StoredJob(**known, standing="ours", record=record)


def all_stored(root: Path | None = None) -> list[StoredJob]:
    """Every job's folder below the state root, by name; none where there is no such root. Raises HostError."""
    root = root or state_dir()
    try:
        names = sorted(name for name in os.listdir(root) if JOB_NAME.fullmatch(name))  # noqa: PTH208 - names are wanted
    except FileNotFoundError:
        return []
    if not names:
        return []
    instance = runner_instance(root)
    found = (read_stored(root / name, instance) for name in names)
    return [stored for stored in found if stored is not None]


def _regular(folder_fd: int, name: str) -> os.stat_result | None:
    try:
        info = os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
    except OSError:
        return None
    return None if why_not_ours(info, stat.S_ISREG) else info


def _decoded(folder_fd: int, name: str, decoder: msgspec.json.Decoder[_D], schema: str) -> _D:
    """One file of the folder. Raises _UnreadableError."""
    damaged = f"its {name} is damaged"
    try:
        fd = os.open(name, _FLAGS, dir_fd=folder_fd)
    except FileNotFoundError:
        raise _missing(name) from None
    except OSError as exc:
        raise _UnreadableError("damaged", damaged) from exc
    try:
        if why_not_ours(os.fstat(fd), stat.S_ISREG):
            raise _missing(name)
        data = os.read(fd, _RECORD_MAX + 1)
    except OSError as exc:
        raise _UnreadableError("damaged", damaged) from exc
    finally:
        os.close(fd)
    try:
        found = decoder.decode(data)
        version = found.schema_version
    except _DAMAGES:
        try:
            found, version = None, _HEAD.decode(data).schema_version
        except _DAMAGES as exc:
            raise _UnreadableError("damaged", damaged) from exc
    if version != schema:
        raise _UnreadableError("newer", f"its {name} is of another format: {ascii(version)[:80]}")
    if found is None or len(data) > _RECORD_MAX:
        raise _UnreadableError("damaged", damaged)
    return found


def _missing(name: str) -> _UnreadableError:
    return _UnreadableError("unowned", f"it has no {name} of ours: x07-sandbox did not make it, or it is damaged")
