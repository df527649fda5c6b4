"""The record of a job on disk: what X07's tools read (`job.json`), and what ours need to act on it (`owner.json`).

`job.json` has exactly the keys of X07's. Both are written by rename. The last file says that the instance is proven
gone: `done` is written by the runner, `reaped` by any other process that stopped the job. jobs/reader reads all of it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec.structs import asdict, replace

from x07_sandbox.errors import HostError
from x07_sandbox.host import settings
from x07_sandbox.host.clocks import boot_ms, unix_ms
from x07_sandbox.host.paths import private_dir, replace_file, state_dir
from x07_sandbox.host.processes import Identity, boot_id, pid_namespace

JOB_SCHEMA: Final = "x07.vm.job@0.1.0"
OWNER_SCHEMA: Final = "x07.sandbox.owner@0.1.0"
_MACHINE_ID: Final = Path("/etc/machine-id")
_REAPED: Final = ".reaped"  # in the state root
_SMALL: Final = 256
_INSTANCE_ID: Final = re.compile(r"ri-[0-9a-f]{32}\n?")

_counter = itertools.count()


def new_run_id() -> str:
    """`<unix_ms>-<pid>-<n>`: unique on this machine as long as its clock is not set back within one process."""
    return f"{unix_ms()}-{os.getpid()}-{next(_counter)}"


class JobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What is fixed about a job from the start.

    mark: random id that its processes carry in their arguments. deadline_boot_ms: the deadline on the boot clock
    (host/clocks.boot_ms), which no step of the wall clock moves; 0 where the record does not have it.
    """

    job_id: str
    run_id: str
    backend: str
    folder: Path
    created_unix_ms: int
    deadline_unix_ms: int
    grace_ms: int
    mark: str
    runner_instance: str
    image_digest: str
    deadline_boot_ms: int = 0

    def labels(self) -> dict[str, str]:
        """The `io.x07.*` labels that an instance of this job carries."""
        return {
            "io.x07.schema": "1",
            "io.x07.run_id": self.job_id,
            "io.x07.job_id": self.job_id,
            "io.x07.runner_instance": self.runner_instance,
            "io.x07.deadline_unix_ms": str(self.deadline_unix_ms),
            "io.x07.backend": f"vm.{self.backend}",
            "io.x07.created_unix_ms": str(self.created_unix_ms),
            "io.x07.image_digest": self.image_digest,
        }


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine is for: the job *phase* of the run *run_id*, whose program may take *wall_ms*."""

    run_id: str
    phase: str
    wall_ms: int

    @property
    def job_id(self) -> str:
        """The job's id."""
        return f"{self.run_id}-{self.phase}"

    @property
    def deadline_s(self) -> int:
        """When the job is ended, in whole seconds from now."""
        return (settings.allowance_ms() + self.wall_ms) // 1000 + 1


def create_record(claim: Claim, *, backend: str, image_digest: str) -> JobRecord:
    """Make the job's folder and write `job.json`. Raises HostError."""
    root = private_dir(state_dir())
    record = JobRecord(
        backend=backend,
        folder=root / claim.job_id,
        mark=os.urandom(16).hex(),
        runner_instance=runner_instance(root),
        image_digest=image_digest,
        **_claimed(claim),
    )
    try:
        record.folder.mkdir(mode=0o700)
        record.folder.chmod(0o700)  # whatever the umask took away
    except OSError as exc:
        raise _unwritable(f"cannot make the job's folder {record.folder}", exc) from exc
    try:
        _write_job(record)
    except HostError:
        drop_unstarted(record)
        raise
    return record


def record_values(record: JobRecord) -> dict[str, object]:
    """A record for JSON; `record_from` is the way back."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(record).items()}


def record_from(values: dict[str, object]) -> JobRecord:
    """The record with these values. Raises TypeError."""
    return JobRecord(**(values | {"folder": Path(str(values["folder"]))}))  # type: ignore[arg-type]  # as written


def renewed_record(record: JobRecord, claim: Claim) -> JobRecord:
    """The record of a machine that waited, as that of its job, with its old mark and folder. Raises HostError."""
    renewed = replace(record, **_claimed(claim))
    _write_job(renewed)
    return renewed


def _claimed(claim: Claim) -> dict[str, Any]:
    """Those fields of a record that begin with its job, now."""
    created, allowed_ms = unix_ms(), settings.allowance_ms() + claim.wall_ms
    return {
        "job_id": claim.job_id,
        "run_id": claim.run_id,
        "created_unix_ms": created,
        "deadline_unix_ms": created + allowed_ms,
        "deadline_boot_ms": boot_ms() + allowed_ms,
        "grace_ms": settings.grace_ms(claim.wall_ms),
    }


def renamed_record(record: JobRecord) -> JobRecord:
    """Its folder under the name of its job. Raises HostError."""
    try:
        folder = record.folder.rename(record.folder.with_name(record.job_id))
    except OSError as exc:
        raise HostError(f"cannot rename {record.folder}", exc.strerror or str(exc), "Free space there") from exc
    return replace(record, folder=folder)


def _write_job(record: JobRecord) -> None:
    document: dict[str, object] = {
        "schema_version": JOB_SCHEMA,
        "run_id": record.job_id,
        "backend": record.backend,
        "container_id": f"x07-{record.job_id}",
        "pid": None,
        "created_unix_ms": record.created_unix_ms,
        "deadline_unix_ms": record.deadline_unix_ms,
        "grace_ms": record.grace_ms,
        "cleanup_ms": settings.CLEANUP_MS,
        "ctr": None,
    }
    _write_json(record.folder / "job.json", document)


def drop_unstarted(record: JobRecord) -> None:
    """Remove the folder of a job for which nothing was ever started, as when the disk is full: it has no owner."""
    if not (record.folder / "owner.json").exists():
        import shutil

        shutil.rmtree(record.folder, ignore_errors=True)


def write_owner(
    record: JobRecord, *, runner: Identity, processes: dict[str, Identity], cgroups: tuple[str, ...]
) -> None:
    """Write who runs the job and what was started for it, before any of it is let go."""
    _write_json(
        record.folder / "owner.json",
        {
            "schema_version": OWNER_SCHEMA,
            "run": record.run_id,
            "instance": record.mark,
            "boot_id": boot_id(),
            "deadline_boot_ms": record.deadline_boot_ms,
            "pid_namespace": pid_namespace(),
            "runner": asdict(runner),
            "processes": {name: asdict(identity) for name, identity in processes.items()},
            "cgroups": list(cgroups),
            "labels": record.labels(),
        },
    )


def mark_done(record: JobRecord) -> None:
    """Record that the job's instance is proven gone, as its runner does. Raises HostError."""
    _write(record.folder / "done", b"done\n")


def mark_reaped(record: JobRecord) -> None:
    """Record that the job's instance is proven gone, as any process but its runner does. Raises HostError.

    One file serves all jobs, by links: a new file costs up to a millisecond on a well-filled ext4 (measured), a link
    6 us, and a sweep may reap a thousand jobs. The folder's own time tells when it was.
    """
    source = record.folder.parent / _REAPED
    with contextlib.suppress(OSError):  # no links on this file system, or too many
        if not source.exists():
            replace_file(source, b"reaped\n")
        with contextlib.suppress(FileExistsError):
            os.link(source, record.folder / "reaped", follow_symlinks=False)
        return
    _write(record.folder / "reaped", b"reaped\n")


def home_of(root: Path) -> Path:
    """Where things beside the state root lie: its parent if that folder is ours and only ours to write, else itself."""
    info = root.parent.stat()
    return root.parent if info.st_uid == os.geteuid() and not info.st_mode & 0o022 else root


def runner_instance(root: Path) -> str:
    """The stable id of this user's runner on this machine, in `home_of` the state root.

    A home folder may be shared by several machines or users (NFS, a container's volume), and a process id or a boot id
    of one means nothing on another. `runner_instance` keeps the format that X07's tools read; `runner_instance.owner`
    beside it says which machine and uid it was made for. Every other machine or uid derives an id of its own from both:
    it is the same each time, nothing has to be written for it, and nobody takes another's jobs for its own.
    Raises HostError for a damaged file.
    """
    path = home_of(root) / "runner_instance"
    try:
        made = _instance_at(path)
        ours = _machine_and_user()
        if _made_once(path.with_name("runner_instance.owner"), f"{ours}\n").strip() == ours:
            return made
        return f"ri-{_sha256(made, ours)[:32]}"
    except OSError as exc:
        from x07_sandbox.host.os_errors import fix_for

        fix = fix_for(exc, "Remove it; a new one is made")
        raise HostError(f"cannot use {path}", exc.strerror or str(exc), fix) from exc


def _machine_and_user() -> str:
    """A digest of this machine's id and our uid: machine-id(5) asks not to pass the id on as it is."""
    try:
        machine = _MACHINE_ID.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        machine = ""  # many containers have none: then only the uid counts
    return _sha256("x07-sandbox", machine, str(os.geteuid()))


def _sha256(*words: str) -> str:
    return sha256("\0".join(words).encode()).hexdigest()


def _instance_at(path: Path) -> str:
    text = _made_once(path, f"ri-{os.urandom(16).hex()}\n")
    if not _INSTANCE_ID.fullmatch(text):
        raise HostError(f"cannot use {path}", "it does not hold a runner id", "Remove it; a new one is made")
    return text.strip()


def _made_once(path: Path, content: str) -> str:
    """The beginning of a small file, which is made with *content* where it is missing. Raises OSError, HostError."""
    if not path.exists():
        temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
        _write(temporary, content.encode())
        with contextlib.suppress(FileExistsError):  # another first run has just made it
            os.link(temporary, path)
        temporary.unlink()
    with path.open(encoding="ascii", errors="replace") as file:
        return file.read(_SMALL)


def _write_json(path: Path, value: dict[str, object]) -> None:
    _write(path, (json.dumps(value, indent=2) + "\n").encode())


def _write(path: Path, data: bytes) -> None:
    try:
        replace_file(path, data)
    except OSError as exc:
        raise _unwritable(f"cannot write {path}", exc) from exc


def _unwritable(what: str, exc: OSError) -> HostError:
    return HostError(what, exc.strerror or str(exc), "Free space there, or set X07_VM_STATE_DIR")
