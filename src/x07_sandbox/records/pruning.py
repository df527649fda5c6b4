"""Removal of unneeded files: the `Pruner`, which removes, counts and reports, and the pruning of records of runs.

The newest records stay, within an age, a number and a size (host/user_settings). A run in progress holds a shared lock
on its folder. A job's record is removed only if its owner.json is valid for this user, the job's machine is recorded as
gone, and no process of the job is alive.
"""

import contextlib
import itertools
import math
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Literal, NamedTuple, cast

import msgspec

from x07_sandbox.errors import SandboxError
from x07_sandbox.host import settings
from x07_sandbox.host.linux import boot_id, pid_namespace
from x07_sandbox.host.locks import file_lock, is_locked, lock_for_removal
from x07_sandbox.host.paths import entries, private_dir, state_dir, why_not_ours
from x07_sandbox.host.processes import is_alive
from x07_sandbox.host.user_settings import DiskLimits, disk_limits
from x07_sandbox.host.waiting import Deadline, unix_ms
from x07_sandbox.records.reader import StoredJob, read_stored
from x07_sandbox.records.runs import APPLYING, JOB_NAME, RUN_NAME, record_in, runner_instance, runs_dir, started_ms

Part = Literal["images", "cache", "runs"]
PartName = Literal["images", "templates", "cache", "runs", "records"]  # of `x07 df`
Kind = Literal["image", "base", "template", "artifact", "verification", "leftover", "job", "run"]
PARTS: Final[tuple[Part, ...]] = ("images", "cache", "runs")
# Temporary names of host/paths.replace_file and programs/artifacts.
_TEMPORARY: Final = re.compile(r"\..+\.[0-9a-f]{16}")
BLOCK: Final = 512  # stat(2): st_blocks
_DOOMED: Final = ".pruned-"  # no name of a record
_YOUNG_S: Final = 3600.0  # records of the last hour stay, however many there are
_RETENTION_BUDGET_S: Final = 0.3


class Removed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file or folder that was removed, or would be removed in a dry run. bytes: the disk space that this frees."""

    kind: Kind
    path: str
    bytes: int
    why: str


class Kept(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An old file or folder that was not removed, and why. failed: whether an attempt to remove it failed."""

    kind: Kind
    path: str
    why: str
    failed: bool = False


class PruneReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The output of `x07 prune --json`. dry_run: whether it was a dry run. bytes: the disk space freed."""

    schema_version: Literal["x07.sandbox.prune@0.1.0"] = "x07.sandbox.prune@0.1.0"
    dry_run: bool
    bytes: int
    removed: tuple[Removed, ...]
    kept: tuple[Kept, ...]


class PartUsage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One part of state and cache. bytes: its size on disk. prunable_bytes: the bytes that `x07 prune` would free."""

    name: PartName
    path: str
    files: int
    bytes: int
    prunable_bytes: int


class DfReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The output of `x07 df --json`. bytes, prunable_bytes: the sums over all parts."""

    schema_version: Literal["x07.sandbox.df@0.1.0"] = "x07.sandbox.df@0.1.0"
    parts: tuple[PartUsage, ...]
    bytes: int
    prunable_bytes: int


class Row(NamedTuple):
    """A thing that was removed or kept. name: its path, or the id of a job, a run or a container."""

    kind: str  # as in the report
    name: str
    why: str
    bytes: int = 0
    failed: bool = False


class Pruner:
    """Remover of files and folders. In a dry run, it only counts them. now_ms: the wall-clock time at the start.

    removed, kept: what was done, in order.
    """

    def __init__(self, progress: Callable[[str], None], *, dry_run: bool) -> None:
        self.progress = progress
        self.dry_run = dry_run
        self.now_ms = unix_ms()
        self.removed: list[Row] = []
        self.kept: list[Row] = []
        self._links: dict[tuple[int, int], int] = {}  # for each file, the number of its hard links that would be left

    def remove(self, kind: Kind, path: Path, why: str, how: Callable[[Path], None]) -> None:
        """Remove *path* by calling *how*. A failure is reported, not raised."""
        size = sum(self._freed(info) for info in everything(path))
        if not self.dry_run:
            try:
                how(path)
            except FileNotFoundError:  # another process was faster
                return
            except (OSError, SandboxError) as exc:
                error = exc.strerror or str(exc) if isinstance(exc, OSError) else str(exc)
                self.kept.append(Row(kind, str(path), f"it cannot be removed: {error}", failed=True))
                return
        self.removed.append(Row(kind, str(path), why, size))

    def remove_own(self, kind: Kind, path: Path, why: str, how: Callable[[Path], None]) -> None:
        """Remove a folder or an artifact's file like `remove`, but only if it belongs to this user."""
        if problem := why_not_ours(path.lstat(), stat.S_ISREG if kind == "artifact" else stat.S_ISDIR):
            self.keep(kind, path, problem)
        else:
            self.remove(kind, path, why, how)

    def keep(self, kind: Kind, path: Path, why: str) -> None:
        """Report that *path* stays."""
        self.kept.append(Row(kind, str(path), why))

    def old(self, info: os.stat_result, limit_s: float = settings.RETENTION_S) -> bool:
        """Whether a file was last changed over limit_s ago, by the wall clock, since other clocks end at a reboot."""
        return self.now_ms - info.st_mtime_ns // 1_000_000 > limit_s * 1000

    def report(self) -> PruneReport:
        """Return the report on all files and folders that were removed or kept."""
        removed = (
            Removed(kind=cast("Kind", row.kind), path=row.name, bytes=row.bytes, why=row.why) for row in self.removed
        )
        kept = (Kept(kind=cast("Kind", row.kind), path=row.name, why=row.why, failed=row.failed) for row in self.kept)
        size = sum(row.bytes for row in self.removed)
        return PruneReport(dry_run=self.dry_run, bytes=size, removed=tuple(removed), kept=tuple(kept))

    def _freed(self, info: os.stat_result) -> int:
        """Return the disk space that removing one name of a file frees. Images share files by hard links."""
        file = info.st_dev, info.st_ino
        left = self._links.get(file, info.st_nlink) - 1
        self._links[file] = left
        return info.st_blocks * BLOCK if left <= 0 or stat.S_ISDIR(info.st_mode) else 0


def sweep_temporaries(folder: Path, pruner: Pruner) -> None:
    """Remove partial files that killed processes left in *folder*, once they are a day old."""
    for path in entries(folder):
        info = path.lstat()
        ours = _TEMPORARY.fullmatch(path.name) and not why_not_ours(info, stat.S_ISREG)
        if ours and pruner.old(info, settings.DAY_S):
            pruner.remove("leftover", path, "a killed process left it incomplete", Path.unlink)


def everything(path: Path) -> Iterator[os.stat_result]:
    """Yield the stat of *path* and of everything below it, without following links."""
    waiting = [path]
    while waiting:  # no recursion: a program may nest folders deeper than Python's stack
        with contextlib.suppress(OSError):
            here = waiting.pop()
            info = here.lstat()
            yield info
            if stat.S_ISDIR(info.st_mode):
                waiting += entries(here)


def sizes_by_file(folder: Path) -> dict[tuple[int, int], int]:
    """Return the disk space of everything below a folder, by file, so that hard links count once."""
    below = itertools.islice(everything(folder), 1, None)  # the first is the folder itself
    return {(info.st_dev, info.st_ino): info.st_blocks * BLOCK for info in below}


def prune_records(pruner: Pruner, *, unapplied: bool = False, budget_s: float = math.inf) -> bool:
    """Remove the records of runs that exceed the limits. Return whether budget_s, in seconds, was enough for all.

    unapplied: whether this includes runs with changes that were not applied. Raises SandboxError for an unusable state
    folder and for invalid settings.
    """
    if not os.path.lexists(state_dir()):
        return True
    root = private_dir(state_dir())
    runs = runs_dir(root)
    if os.path.lexists(runs):
        private_dir(runs)
    of_jobs, of_runs = entries(root), entries(runs)
    for path in (*of_jobs, *of_runs):
        if path.name.startswith(_DOOMED) and not why_not_ours(path.lstat(), stat.S_ISDIR):
            pruner.remove("leftover", path, "an interrupted removal left it", shutil.rmtree)
    jobs: dict[str, list[Path]] = {path.name: [] for path in of_runs if RUN_NAME.fullmatch(path.name)}
    for path in of_jobs:
        if match := JOB_NAME.fullmatch(path.name):
            jobs.setdefault(match[1], []).append(path)
    limits = disk_limits()
    excess = [*_excess(runs, list(jobs), limits, pruner.now_ms, Deadline.after(budget_s / 2))]
    deadline = Deadline.after(budget_s / 2)
    applying = {path.name for path in entries(runs / APPLYING)}  # their folders are needed for recovery
    for run, why in reversed(excess):
        if run not in applying:
            _prune_run(runs / run, jobs[run], why, pruner, days=limits.runs_days, unapplied=unapplied)
        if deadline.passed():
            return False
    return True


def remove_excess(mark: Path, say: Callable[[str], None]) -> None:
    """Remove records of runs that exceed the limits, within 0.3 s. The next call goes on. Raises SandboxError, OSError.

    mark: the file `runs.RETENTION`. say: called with a line the first time that something is removed.
    """
    with file_lock(mark, most_s=0):
        os.utime(mark)
        pruner = Pruner(lambda _text: None, dry_run=False)
        done = prune_records(pruner, budget_s=_RETENTION_BUDGET_S)
        runs = sum(row.kind == "run" for row in pruner.removed)
        if runs and not mark.stat().st_size:
            _, days, most, mib = disk_limits()
            say(
                f"removed the records of {runs} old run{'' if runs == 1 else 's'}: x07 keeps those of the last "
                f"{days} days, at most {most} and {mib} MiB ([disk] in sandbox.toml). This message is shown once"
            )
            mark.write_text("shown\n")
        if not done:
            os.utime(mark, (0, 0))


def _excess(
    runs: Path, names: list[str], limits: DiskLimits, now_ms: int, deadline: Deadline
) -> Iterator[tuple[str, str]]:
    """Yield the runs that exceed a limit, newest first, each with the reason, or "" if it is their age.

    deadline: when to stop measuring sizes.
    """
    taken = 0
    for number, run in enumerate(sorted(names, key=started_ms, reverse=True)):
        if now_ms - started_ms(run) > limits.runs_days * settings.DAY_S * 1000:
            yield run, ""
        elif number >= limits.runs_max:
            yield run, f"{limits.runs_max} runs are newer"
        elif not deadline.passed():
            taken += sum(sizes_by_file(runs / run).values())
            if taken > limits.runs_mib << 20:
                yield run, f"with newer runs, it takes more than {limits.runs_mib} MiB"


def _prune_run(folder: Path, of_jobs: list[Path], why: str, pruner: Pruner, *, days: int, unapplied: bool) -> None:
    """Remove the records of one run that exceeds a limit, unless they are needed. why, unapplied: as above."""
    jobs = _jobs(of_jobs, pruner, days * settings.DAY_S)
    if any(job.ended is None for job in jobs) or is_locked(folder):
        return
    if (sandbox := record_in(folder)) is not None and sandbox.paused and not unapplied:
        return  # it has changes that may still be wanted
    changes = folder / "changes"  # applying or undoing changes writes in it, or in a folder for later changes
    touched = [path for path in (folder, changes, *changes.glob("later-*")) if os.path.lexists(path)]
    infos = [path.lstat() for path in touched] + [info for job in jobs for info in (job.info, job.ended_info) if info]
    if saved := os.path.lexists(changes / "changes.json"):
        why = ""  # saved changes and undo data are kept as long as their age allows
    if not all(pruner.old(info, _YOUNG_S if why else days * settings.DAY_S) for info in infos):
        return
    if saved and not unapplied and not os.path.lexists(changes / "undo"):
        return
    for job in jobs:
        if problem := _doubt(job):
            pruner.keep("job", job.folder, problem)
            return
    why = why or f"it ended more than {days} days ago"
    for job in jobs:
        pruner.remove("job", job.folder, why, remove_record)
    if os.path.lexists(folder):
        pruner.remove_own("run", folder, why, _remove_run)


def _jobs(folders: list[Path], pruner: Pruner, limit_s: float) -> list[StoredJob]:
    """Return the records of this user's jobs. Report old jobs that may still exist, old links and others' folders."""
    jobs = []
    for folder in folders:
        if (stored := read_stored(folder, runner_instance(folder.parent))) is None:
            continue
        ours = not why_not_ours(stored.info, stat.S_ISDIR)
        if ours:
            jobs.append(stored)
        if pruner.old(stored.info, limit_s) and not (ours and stored.ended):
            why = "its VM or container is not recorded as gone, so it may still exist"
            pruner.keep("job", folder, why if ours else stored.why)
    return jobs


def _doubt(job: StoredJob) -> str:
    """Return why a job's record must stay, or "" if it can be removed."""
    if job.owner is None:
        return job.why
    if job.owner.boot_id != boot_id() or job.owner.pid_namespace != pid_namespace():
        return ""  # its pids mean nothing here, and `done` proves that its processes are gone
    return "one of its processes is alive" if any(map(is_alive, job.owner.processes.values())) else ""


def doomed_name(folder: Path) -> Path:
    """Return the path to which a folder is renamed before its removal. Readers ignore folders with this name."""
    return folder.with_name(f"{_DOOMED}{folder.name}")


def remove_record(folder: Path) -> None:
    """Remove the folder of a job or a run. An interrupted removal leaves none that looks live. Raises OSError."""
    doomed = doomed_name(folder)
    folder.rename(doomed)
    (doomed / "job.json").unlink(missing_ok=True)
    shutil.rmtree(doomed)


def _remove_run(folder: Path) -> None:
    """Remove the folder of a run that is not in progress. Raises OSError if that fails."""
    with lock_for_removal(folder) as free:
        if not free:
            raise BlockingIOError(0, "the run is in progress")
        remove_record(folder)
