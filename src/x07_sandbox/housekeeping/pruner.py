"""Removal of unused things, for pruning and sweeping: remove, count and report. What may still be in use is kept."""

import contextlib
import itertools
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Literal, NamedTuple, cast

import msgspec

from x07_sandbox.errors import SandboxError
from x07_sandbox.host import settings
from x07_sandbox.host.clocks import unix_ms
from x07_sandbox.host.paths import why_not_ours

Part = Literal["images", "cache", "runs"]
Kind = Literal["image", "base", "template", "artifact", "verification", "leftover", "job", "run"]
PARTS: Final[tuple[Part, ...]] = ("images", "cache", "runs")
# Temporary names of host/paths.replace_file and programs/artifacts.
_TEMPORARY: Final = re.compile(r"\..+\.[0-9a-f]{16}")
BLOCK: Final = 512  # stat(2): st_blocks


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


def entries(folder: Path) -> list[Path]:
    """Return the sorted paths of a folder's entries, or an empty list if the folder does not exist."""
    try:
        with os.scandir(folder) as found:
            return sorted(folder / entry.name for entry in found)
    except FileNotFoundError:
        return []


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
