"""What every part of pruning shares: removing, counting and reporting. What cannot be judged is kept and reported."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from x07_sandbox.errors import SandboxError
from x07_sandbox.host import settings
from x07_sandbox.host.clocks import unix_ms
from x07_sandbox.host.paths import why_not_ours

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SCHEMA: Final = "x07.sandbox.prune@0.1.0"
Part = Literal["images", "cache", "runs"]
Kind = Literal["image", "base", "template", "artifact", "verification", "leftover", "job", "run"]
PARTS: Final[tuple[Part, ...]] = ("images", "cache", "runs")
# host/paths replace_file and programs/artifacts write beside a file's place, and rename.
_TEMPORARY: Final = re.compile(r"\..+\.[0-9a-f]{16}")
_BLOCK: Final = 512  # stat(2): st_blocks


class Removed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One thing that was removed, or would be. bytes: what the disk gets back."""

    kind: Kind
    path: str
    bytes: int
    why: str


class Kept(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One thing that stays although it is old or nobody's, and why. failed: removing it was tried."""

    kind: Kind
    path: str
    why: str
    failed: bool = False


class PruneReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `x07 prune --json` prints. dry_run: nothing was removed. bytes: of all together."""

    schema_version: Literal["x07.sandbox.prune@0.1.0"] = SCHEMA
    dry_run: bool
    bytes: int
    removed: tuple[Removed, ...]
    kept: tuple[Kept, ...]


class Pruner:
    """Removes one thing after the other, or only counts them. now_ms: the wall clock, asked once."""

    def __init__(self, progress: Callable[[str], None], *, dry_run: bool) -> None:
        self.progress = progress
        self.now_ms = unix_ms()
        self._dry_run = dry_run
        self._removed: list[Removed] = []
        self._kept: list[Kept] = []
        self._links: dict[tuple[int, int], int] = {}  # how many names a file would still have

    def remove(self, kind: Kind, path: Path, why: str, how: Callable[[Path], None]) -> None:
        """Remove *path* as *how* does; what cannot be removed is reported and stays."""
        size = sum(self._freed(info) for info in _everything(path))
        if not self._dry_run:
            try:
                how(path)
            except FileNotFoundError:  # somebody else was quicker
                return
            except (OSError, SandboxError) as exc:
                told = exc.strerror or str(exc) if isinstance(exc, OSError) else str(exc)
                self._kept.append(Kept(kind=kind, path=str(path), why=f"it cannot be removed: {told}", failed=True))
                return
        self._removed.append(Removed(kind=kind, path=str(path), bytes=size, why=why))

    def remove_own(self, kind: Kind, path: Path, why: str, how: Callable[[Path], None]) -> None:
        """As `remove`, for a folder, or an artifact's file; one that is not ours is kept."""
        if problem := why_not_ours(path.lstat(), stat.S_ISREG if kind == "artifact" else stat.S_ISDIR):
            self.keep(kind, path, problem)
        else:
            self.remove(kind, path, why, how)

    def keep(self, kind: Kind, path: Path, why: str) -> None:
        """Tell that *path* stays."""
        self._kept.append(Kept(kind=kind, path=str(path), why=why))

    def old(self, info: os.stat_result, limit_s: float = settings.RETENTION_S) -> bool:
        """Whether a file was last changed longer ago than that, by the wall clock: there is no other across boots."""
        return self.now_ms - info.st_mtime_ns // 1_000_000 > limit_s * 1000

    def report(self) -> PruneReport:
        """All that was done."""
        size = sum(removed.bytes for removed in self._removed)
        return PruneReport(dry_run=self._dry_run, bytes=size, removed=tuple(self._removed), kept=tuple(self._kept))

    def _freed(self, info: os.stat_result) -> int:
        """What the disk gets back for this name of a file: images share files, and the last name gives them back."""
        file = info.st_dev, info.st_ino
        left = self._links.get(file, info.st_nlink) - 1
        self._links[file] = left
        return info.st_blocks * _BLOCK if left <= 0 or stat.S_ISDIR(info.st_mode) else 0


def sweep_temporaries(folder: Path, pruner: Pruner) -> None:
    """Remove what killed processes left half written in *folder*; one that lives needs no day for it."""
    for path in entries(folder):
        info = path.lstat()
        if (
            _TEMPORARY.fullmatch(path.name)
            and not why_not_ours(info, stat.S_ISREG)
            and pruner.old(info, settings.DAY_S)
        ):
            pruner.remove("leftover", path, "a killed process left it half written", unlink)


def entries(folder: Path) -> list[Path]:
    """What is in a folder, sorted; nothing where it is not there."""
    try:
        with os.scandir(folder) as found:
            return sorted(folder / entry.name for entry in found)
    except FileNotFoundError:
        return []


def unlink(path: Path) -> None:
    """Remove a file. Raises OSError."""
    path.unlink()


def _everything(path: Path) -> Iterator[os.stat_result]:
    """The state of *path* and of all below it; no link is followed."""
    with contextlib.suppress(OSError):
        info = path.lstat()
        yield info
        if stat.S_ISDIR(info.st_mode):
            for below in entries(path):
                yield from _everything(below)
