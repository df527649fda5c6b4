"""Jobs and runs: the record of a job, which records/reader reads, and the folders of runs.

`job.json` has exactly the keys that the X07 language's tools use. `owner.json`, for this tool only, names the x07
process to which the job belongs. A file `done` or `reaped` means that the job's machine (VM, container or confined
process) is proven gone. The job's x07 process writes `done`; any other process writes `reaped`.

A run's folder, `runs/RUN/`, holds everything that is stored about the run except the records of its jobs. It is locked
while the run is in progress.
"""

import contextlib
import itertools
import json
import os
import re
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
from msgspec.structs import asdict, replace

from x07_sandbox.errors import Command, HostError, Text, UsageError
from x07_sandbox.host import settings
from x07_sandbox.host.documents import prepared
from x07_sandbox.host.linux import boot_id, boot_ms, pid_namespace
from x07_sandbox.host.paths import fix_for, private_dir, raised_as, replace_file, state_dir
from x07_sandbox.host.processes import Identity
from x07_sandbox.host.waiting import unix_ms
from x07_sandbox.policy.denials import Denial

JOB_SCHEMA: Final = "x07.vm.job@0.1.0"
OWNER_SCHEMA: Final = "x07.sandbox.owner@0.1.0"
JOB_NAME: Final = re.compile(r"((\d{1,15})-(\d{1,10})-\d{1,10})-([a-z][a-z0-9-]{0,63})")
Ended = Literal["done", "reaped"]
ENDS: Final[tuple[Ended, ...]] = ("done", "reaped")
_MACHINE_ID: Final = Path("/etc/machine-id")
_INSTANCE_ID: Final = re.compile(r"ri-[0-9a-f]{32}\n?")

_FREE: Final = "Free disk space, or set X07_VM_STATE_DIR"

_counter = itertools.count()


def new_run_id() -> str:
    """Return `<unix_ms>-<pid>-<n>`: unique on this machine unless the clock is set back within one process."""
    return f"{unix_ms()}-{os.getpid()}-{next(_counter)}"


class JobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The fixed facts about a job.

    mark: the random text among the arguments of the job's processes, which identifies them. deadline_boot_ms: the
    deadline on the boot clock (host/waiting.boot_ms), which does not jump.
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
    deadline_boot_ms: int

    def labels(self) -> dict[str, str]:
        """Return the `io.x07.*` labels of the job's machine or container."""
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
    """The job of the phase *phase* in the run *run_id*. wall_ms: how long the job's program may run."""

    run_id: str
    phase: str
    wall_ms: int

    @property
    def job_id(self) -> str:
        """The job's id."""
        return f"{self.run_id}-{self.phase}"

    @property
    def deadline_s(self) -> int:
        """The time until the job is killed, in whole seconds."""
        return (settings.allowance_ms() + self.wall_ms) // 1000 + 1


def create_record(claim: Claim, *, backend: str, image_digest: str) -> JobRecord:
    """Make the job's folder and write `job.json`. Raises HostError if that fails."""
    root = private_dir(state_dir())
    record = JobRecord(
        backend=backend,
        folder=root / claim.job_id,
        mark=os.urandom(16).hex(),
        runner_instance=runner_instance(root),
        image_digest=image_digest,
        **_claimed(claim),
    )
    with raised_as(HostError, f"cannot make the job's folder {record.folder}", _FREE):
        record.folder.mkdir(mode=0o700)
        record.folder.chmod(0o700)  # the umask may have removed some of these bits
    try:
        _write_job(record)
    except HostError:
        drop_unstarted(record)
        raise
    return record


def renewed_record(record: JobRecord, claim: Claim) -> JobRecord:
    """Rewrite a waiting machine's record for the job of *claim*. Raises HostError.

    The record keeps its folder and the random mark that identifies the machine's processes.
    """
    renewed = replace(record, **_claimed(claim))
    _write_job(renewed)
    return renewed


def _claimed(claim: Claim) -> dict[str, Any]:
    """Return the fields of a record that depend on *claim* and the current time."""
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
    """Rename the record's folder after its job. Raises HostError if that fails."""
    with raised_as(HostError, f"cannot rename {record.folder}", "Free disk space"):
        folder = record.folder.rename(record.folder.with_name(record.job_id))
    return replace(record, folder=folder)


def _write_job(record: JobRecord) -> None:
    known = {name: getattr(record, name) for name in ("created_unix_ms", "deadline_unix_ms", "grace_ms")}
    head: dict[str, object] = {"schema_version": JOB_SCHEMA, "run_id": record.job_id, "backend": record.backend}
    head |= {"container_id": f"x07-{record.job_id}", "pid": None}
    _write_json(record.folder / "job.json", head | known | {"cleanup_ms": settings.CLEANUP_MS, "ctr": None})


def drop_unstarted(record: JobRecord) -> None:
    """Remove the folder of a job if it has no owner.json, because then nothing was started for the job."""
    if not (record.folder / "owner.json").exists():
        import shutil

        shutil.rmtree(record.folder, ignore_errors=True)


def write_owner(
    record: JobRecord, *, runner: Identity, processes: dict[str, Identity], cgroups: tuple[str, ...]
) -> None:
    """Write owner.json: the job's x07 process (*runner*), its other processes and control groups.

    Call this while the other processes still wait for permission to continue. Raises HostError if it fails.
    """
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


def job_names(root: Path) -> list[str]:
    """Return the names of the jobs' folders in *root*, in any order. Raises OSError if *root* cannot be read."""
    return _named(root, JOB_NAME)


def _named(folder: Path, pattern: re.Pattern[str]) -> list[str]:
    """Return the names in a folder that match, in any order, or none if there is no folder. Raises OSError."""
    try:
        return [name for name in os.listdir(folder) if pattern.fullmatch(name)]  # noqa: PTH208 - names are wanted
    except FileNotFoundError:
        return []


def unfinished_jobs(root: Path, most: int | None = None) -> list[str]:
    """Check the *most* newest jobs. Return the names of those without a `done` or `reaped` file, newest first.

    Raises OSError if the folder exists and cannot be read.
    """
    names = sorted(job_names(root), reverse=True)  # the names start with the run's time
    place = os.fspath(root)
    return [name for name in names[:most] if not any(os.path.lexists(f"{place}/{name}/{end}") for end in ENDS)]


def mark_done(record: JobRecord) -> None:
    """Write the file `done`: the job's machine is proven gone. For the job's own x07 process. Raises HostError."""
    _write(record.folder / "done", b"done\n")


def mark_reaped(record: JobRecord) -> None:
    """Write the file `reaped`: the job's machine is proven gone. For all other processes. Raises HostError."""
    _write(record.folder / "reaped", b"reaped\n")


def state_home(root: Path) -> Path:
    """Return the folder for other state files: the parent of *root* if only this user can write there, else *root*."""
    info = root.parent.stat()
    return root.parent if info.st_uid == os.geteuid() and not info.st_mode & 0o022 else root


def runner_instance(root: Path) -> str:
    """Return the stable `runner_instance` id of this user on this machine. Raises HostError for a damaged file.

    Machines or users may share a home folder (NFS, a container's volume), but a pid on one machine means nothing on
    another. The file `runner_instance` has the format of X07's tools. `runner_instance.owner` records the machine and
    uid to which the id belongs. Every other machine or uid derives its own id from both files, so that no process takes
    another machine's jobs for its own.
    """
    path = state_home(root) / "runner_instance"
    try:
        made = _made_once(path, f"ri-{os.urandom(16).hex()}\n")
        if not _INSTANCE_ID.fullmatch(made):
            raise HostError(f"cannot use {path}", "it contains no valid id", "Remove the file. x07 creates a new one")
        made, ours = made.strip(), _machine_and_user()
        if _made_once(path.with_name("runner_instance.owner"), f"{ours}\n").strip() == ours:
            return made
        return f"ri-{_sha256(made, ours)[:32]}"
    except OSError as exc:
        fix = fix_for(exc, "Remove the file. x07 creates a new one")
        raise HostError(f"cannot use {path}", exc.strerror or str(exc), fix) from exc


def _machine_and_user() -> str:
    """Return a digest of this machine's id and uid. machine-id(5) asks programs not to reveal the id itself."""
    try:
        machine = _MACHINE_ID.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        machine = ""  # as in many containers
    return _sha256("x07-sandbox", machine, str(os.geteuid()))


def _sha256(*words: str) -> str:
    from hashlib import sha256  # loads OpenSSL, which a listing of runs does not need

    return sha256("\0".join(words).encode()).hexdigest()


def _made_once(path: Path, content: str) -> str:
    """Create a small file with *content* if it is missing, and return the start of it. Raises OSError, HostError."""
    if not path.exists():
        temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
        _write(temporary, content.encode())
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.link(temporary, path)
        temporary.unlink()
    with path.open(encoding="ascii", errors="replace") as file:
        return file.read(256)


def _write_json(path: Path, value: dict[str, object]) -> None:
    _write(path, (json.dumps(value, indent=2) + "\n").encode())


def _write(path: Path, data: bytes) -> None:
    with raised_as(HostError, f"cannot write {path}", _FREE):
        replace_file(path, data)


KILL: Final = "kill"  # a pipe to the x07 process of the run
SANDBOX: Final = "sandbox.json"  # a SandboxRecord
SOCKET: Final = "socket"  # of the holder of a sandbox
NET_LOG: Final = "net.jsonl"  # of the egress gate
REQUEST: Final = "request.json"  # identifies the run until there is a result
RUN_NAME: Final = re.compile(r"\d{1,15}-\d{1,10}-\d{1,10}")
# Beside the folders of the runs:
APPLYING: Final = ".applying"  # a folder of sessions/saved_changes
RETENTION: Final = ".retention"  # its time is that of the last removal; it has content once the message was shown


def runs_dir(root: Path) -> Path:
    """Return the folder for all runs. It is inside the state folder *root* if other users can write to its parent."""
    home = state_home(root)
    return home / ("runs" if home != root else ".runs")


def all_runs() -> Path:
    """Return the folder that contains the folders of all this user's runs. Raises HostError."""
    return private_dir(runs_dir(private_dir(state_dir())))


def run_folder(run: str) -> Path:
    """Return the folder of a run's files. The folder may not exist."""
    return runs_dir(state_dir()) / run


def run_names() -> list[str]:
    """Return the ids of all runs of this user that have a folder."""
    return _named(runs_dir(state_dir()), RUN_NAME)


def runs_with(file: str) -> list[str]:
    """Return the ids of the runs that have *file*, oldest first."""
    root = all_runs()
    names = [name for name in run_names() if os.path.lexists(f"{root}/{name}/{file}")]  # thousands of them
    return sorted(names, key=lambda name: [int(part) for part in name.split("-")])


def started_ms(run: str) -> int:
    """Return when a run started, in milliseconds since 1970."""
    return int(run.partition("-")[0])


def find_run(run: str | None, file: str, what: str, fix: Text, *, action: str = "") -> Path:
    """Return the folder of the run whose id is or starts with *run* (`is_named`); None stands for the latest run.

    Only runs that have *file* count. Raises UsageError if none or several match.
    what, action, fix: parts of the error: the content of *file*, what a run that has *file* did, and the advice.
    """
    names = [name for name in runs_with(file) if run is None or is_named(name, run)]
    if not names:
        why = f"no run{f' with {described(run)}' if run else ''} has {action or what}"
        raise UsageError(f"cannot find {what}", why, fix)
    return all_runs() / (names[-1] if run is None else _only(names, run))


def known_run(word: str) -> str:
    """Return the id of the run that *word* names: a run id, a unique prefix of one, or a job id. Raises UsageError."""
    job = JOB_NAME.fullmatch(word)
    wanted = job[1] if job else word
    names = set()
    if os.path.lexists(state_dir()):
        names = {match[1] for name in job_names(state_dir()) if (match := JOB_NAME.fullmatch(name))}
        names.update(run_names())
    found = sorted(name for name in names if is_named(name, wanted))
    if not found:
        why = f"no run has {described(wanted)}"
        raise UsageError(f"cannot find run {word}", why, ("To list all runs: ", Command("x07 ps --all")))
    return _only(found, word)


def _only(names: list[str], word: str) -> str:
    if len(names) > 1:
        why = f"{len(names)} run ids start with {word}, such as {names[0]}"
        raise UsageError(f"the run id {word} is ambiguous", why, "Use more digits of the id")
    return names[0]


def is_named(name: str, word: str) -> bool:
    """Return whether *word* is the run id *name* or the start of it. A whole id is never the start of another one."""
    return name == word or (not RUN_NAME.fullmatch(word) and name.startswith(word))


def described(word: str) -> str:
    """Return a description of the ids that `is_named` accepts for *word*."""
    return f"the id {word}" if RUN_NAME.fullmatch(word) else f"an id that starts with {word}"


class SandboxRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The file SANDBOX of the folder of a run: facts about a sandbox. image: the digest of its image, or None.

    until_unix_ms: when its lifetime ends. left_out: one denial for each reason why entries of its folders were not
    copied in. forked_from: the id of the sandbox from whose snapshot it has started, or "". paused: the id of the
    snapshot from which it goes on, or "" while it is open and after its end.
    """

    name: str
    tags: dict[str, str]
    opened_unix_ms: int
    until_unix_ms: int
    backend: str
    image: str | None
    left_out: tuple[Denial, ...] = ()
    forked_from: str = ""
    paused: str = ""


def record_of(run: str) -> SandboxRecord | None:
    """Return the record of a sandbox, or None if it has none."""
    return record_in(all_runs() / run)


def record_in(folder: Path) -> SandboxRecord | None:
    """Return the record of the sandbox whose run has this folder, or None if it has none."""
    try:
        return msgspec.json.decode((folder / SANDBOX).read_bytes(), type=prepared(SandboxRecord))
    except (OSError, msgspec.MsgspecError):
        return None
