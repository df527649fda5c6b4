"""Changes of runs that are kept: found again, applied, undone, and put right after a kill.

`runs/RUN/changes/`: `changes.json` and `data` (files/changes) as the guest told them, and what files/apply keeps there.
While something is being applied a file of the run's name lies in `runs/.applying/`, so that the next command finds
what a killed one left without looking at every run.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from typing import TYPE_CHECKING, Final, NamedTuple

from x07_sandbox.errors import HostError, SandboxError, UsageError
from x07_sandbox.host.paths import private_dir, read_bounded, state_dir
from x07_sandbox.runs.folder import runs_dir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from x07_sandbox.files.changes import ChangeSet

_RUN: Final = re.compile(r"\d{1,15}-\d{1,10}-\d{1,10}")
_APPLYING: Final = ".applying"
_CHANGES_MAX: Final = 1 << 30


class KeptChanges(NamedTuple):
    """Those of one run. folder: `runs/RUN/changes`."""

    run: str
    folder: Path
    changes: ChangeSet

    @property
    def applied(self) -> bool:
        """Whether the host has them, as far as we did it."""
        return (self.folder / "undo").is_dir()


def find(run: str | None) -> KeptChanges:
    """The changes of a run: of its name, or of the one whose name begins so; None for the latest that has some.

    Raises UsageError.
    """
    from x07_sandbox.files.changes import decode

    root = _runs()
    names = [name for name in _names(root) if run is None or name.startswith(run)]
    if run in names:
        names = [run]
    if not names:
        why = "no run has changes to files" if run is None else "no run of such a name has any"
        raise UsageError("cannot find changes", why, "Run something with a folder that it may change")
    if run is not None and len(names) > 1:
        why = f"{len(names)} runs have names that begin so: {names[0]} and others"
        raise UsageError(f"cannot tell which run {run} is", why, "Give more of its name")
    name = names[-1]
    folder = root / name / "changes"
    try:
        changes = decode(read_bounded(folder / "changes.json", "list of changes", _CHANGES_MAX))
    except ValueError as exc:
        raise UsageError(f"cannot use the changes of run {name}", f"they are damaged: {exc}", "Run it again") from exc
    return KeptChanges(run=name, folder=folder, changes=changes)


def _runs() -> Path:
    return private_dir(runs_dir(private_dir(state_dir())))


def _names(root: Path) -> list[str]:
    """Runs that have changes, the oldest first."""
    found = [path.name for path in root.iterdir() if _RUN.fullmatch(path.name)]
    found.sort(key=lambda name: [int(part) for part in name.split("-")])
    return [name for name in found if (root / name / "changes" / "changes.json").is_file()]


def do(kept: KeptChanges, changes: ChangeSet, on_wait: Callable[[str], None]) -> ChangeSet:
    """Apply *changes*, which are those of *kept* or a part. Raises ConflictError, HostError."""
    from x07_sandbox.files.apply import apply

    with (kept.folder / "data").open("rb") as data, applying(kept.run):
        return apply(changes, data.fileno(), kept.folder, on_wait=on_wait)


def undo(kept: KeptChanges, on_wait: Callable[[str], None]) -> ChangeSet:
    """Bring back what was there before they were applied. Raises UsageError, ConflictError, HostError."""
    import shutil

    from x07_sandbox.files.apply import apply, why_no_undo
    from x07_sandbox.files.changes import decode

    what = f"cannot undo the changes of run {kept.run}"
    if not kept.applied:
        raise UsageError(what, "they are not applied", "See x07 diff")
    if why := why_no_undo(kept.folder):
        raise HostError(what, why, "Bring back what you need from your own copies")
    place = kept.folder / "undo"
    changes = decode(read_bounded(place / "changes.json", "list of changes", _CHANGES_MAX))
    with (place / "data").open("rb") as data, applying(kept.run):
        done = apply(changes, data.fileno(), kept.folder / "undoing", on_wait=on_wait)
        # From here on they are kept again, and can be applied again.
        shutil.rmtree(place)
        shutil.rmtree(kept.folder / "undoing")
    return done


@contextlib.contextmanager
def applying(run: str) -> Iterator[None]:
    """Around what changes the host's files for a run: whatever ends it, `recover_all` finds what it left."""
    marker = private_dir(_runs() / _APPLYING) / run
    marker.touch(mode=0o600)
    try:
        yield
    finally:
        # Unless something was in the way of undoing it: then the next command tries again.
        if not _is_open(marker.parent.parent / run / "changes"):
            marker.unlink(missing_ok=True)


def _is_open(folder: Path) -> bool:
    """Whether a journal lies there."""
    return any(
        (folder / part / name).exists() for part in (".", "undoing") for name in ("staging", "journal", "committed")
    )


def recover_all(progress: Callable[[str], None]) -> None:
    """Undo or finish what killed commands left half applied; what cannot be is told, and tried again next time."""
    root = runs_dir(state_dir())
    try:
        names = [path.name for path in (root / _APPLYING).iterdir()]
    except OSError:
        return
    from x07_sandbox.files.apply import recover

    for name in names:
        folder = root / name / "changes"
        if not _RUN.fullmatch(name) or not folder.is_dir():
            (root / _APPLYING / name).unlink(missing_ok=True)
            continue
        if _is_busy(folder):
            continue
        try:
            recover(folder)
            if (folder / "undoing").is_dir():
                recover(folder / "undoing")
        except SandboxError as exc:
            progress(str(exc))
            continue
        (root / _APPLYING / name).unlink(missing_ok=True)


def _is_busy(folder: Path) -> bool:
    """Whether a process that lives is applying."""
    for place in (folder, folder / "undoing"):
        try:
            fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
    return False
