"""Changes of runs that are kept: found again, applied, undone, and put right after a kill.

`runs/RUN/changes/`: `changes.json` and `data` (files/changes) as the guest told them, and what files/apply keeps there.
While something is being applied a file of the run's name lies in `runs/.applying/`, so that the next command finds
what a killed one left without looking at every run. What was left out and is applied afterwards has a folder of its
own, `changes/later-N/`, for its journal and for what undoes it; the last one is undone first.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final, NamedTuple

from x07_sandbox.errors import HostError, SandboxError, UsageError
from x07_sandbox.host.locks import folder_to_remove, is_locked, opened_lock
from x07_sandbox.host.paths import private_dir, read_bounded, state_dir
from x07_sandbox.runs.folder import APPLYING, RUN_NAME, all_runs, find_run, runs_dir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from x07_sandbox.files.changes import ChangeSet

_KEPT: Final = "changes/changes.json"
_LATER: Final = "later-"
_CHANGES_MAX: Final = 1 << 30


class SavedChanges(NamedTuple):
    """Those of one run. folder: `runs/RUN/changes`."""

    run: str
    folder: Path
    changes: ChangeSet

    @property
    def applied(self) -> bool:
        """Whether the host has them, as far as we did it."""
        return (self.folder / "undo").is_dir()

    @property
    def undos(self) -> list[Path]:
        """The folders whose `undo` undoes something, the first applied first."""
        return [place for place in (self.folder, *_later(self.folder)) if (place / "undo").is_dir()]

    def done(self) -> set[tuple[str, str]]:
        """What is applied, by root and name. Raises HostError."""
        from x07_sandbox.files.undo_data import undo_entries

        with _sensible(self.run):
            return {name for place in self.undos for name in undo_entries(place)}


def _later(folder: Path) -> list[Path]:
    """The folders of what was left out and applied afterwards, the first first."""
    return sorted(folder.glob(f"{_LATER}*"), key=lambda path: int(path.name.removeprefix(_LATER)))


def find_saved(run: str | None) -> SavedChanges:
    """The changes of the run of that name, or whose name begins so; None for the latest. Raises UsageError."""
    from x07_sandbox.files.changes import decode

    path = find_run(run, _KEPT, "changes to files", "Run something with a folder that it may change")
    name, folder = path.name, path / "changes"
    try:
        changes = decode(read_bounded(folder / "changes.json", "list of changes", _CHANGES_MAX))
    except ValueError as exc:
        raise UsageError(f"cannot use the changes of run {name}", f"they are damaged: {exc}", "Run it again") from exc
    return SavedChanges(run=name, folder=folder, changes=changes)


def apply_saved(
    kept: SavedChanges, changes: ChangeSet, on_wait: Callable[[str], None], *, later: bool = False
) -> ChangeSet:
    """Apply *changes*, which are those of *kept* or a part. Raises ConflictError, HostError.

    later: they were left out, and the others are applied: they have an undo of their own.
    """
    from x07_sandbox.files.apply import apply

    around = _alone(kept.folder, on_wait) if later else contextlib.nullcontext()
    with around, _sensible(kept.run), (kept.folder / "data").open("rb") as data:
        place = kept.folder / f"{_LATER}{len(kept.undos)}" if later else kept.folder
        done = apply(changes, data.fileno(), place, on_wait=on_wait, around=applying(kept.run))
        if later and not done.roots:
            import shutil

            shutil.rmtree(place)  # all of it was there already: there is nothing to undo
        return done


def undo_saved(kept: SavedChanges, on_wait: Callable[[str], None]) -> ChangeSet:
    """Bring back what was there before they were applied. Raises UsageError, ConflictError, HostError.

    Where a part of them was applied afterwards, only that is undone.
    """
    import shutil

    from x07_sandbox.files.apply import apply
    from x07_sandbox.files.changes import decode
    from x07_sandbox.files.inode import ConflictError, undo_conflict_error
    from x07_sandbox.files.undo_data import remove_undo

    what = f"cannot undo the changes of run {kept.run}"
    with _alone(kept.folder, on_wait), _sensible(kept.run), applying(kept.run), contextlib.ExitStack() as stack:
        if not kept.undos:  # or not any more: another command may have undone them meanwhile
            raise UsageError(what, "they are not applied", "See x07 diff")
        folder = kept.undos[-1]
        place = folder / "undo"
        data = stack.enter_context((place / "data").open("rb"))
        changes = decode(read_bounded(place / "changes.json", "list of changes", _CHANGES_MAX))
        try:
            # What it displaces is what the run wrote, which is kept: a full disk is no reason not to take it back.
            done = apply(changes, data.fileno(), folder / "undoing", on_wait=on_wait, keeps=False)
        except ConflictError as exc:
            raise (undo_conflict_error(exc, what) if exc.names else exc) from None
        except HostError as exc:
            raise HostError(what, exc.why, exc.fix) from exc
        # In this order: killed before the last of it, we find all of it done the next time, and end it.
        shutil.rmtree(folder / "undoing")
        remove_undo(folder)  # from here on they are kept again, and can be applied again
    return done


@contextlib.contextmanager
def _alone(folder: Path, on_wait: Callable[[str], None]) -> Iterator[None]:
    """Nobody else applies or undoes what is kept there, as files/apply has it. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with opened_lock(fd, on_wait=lambda: on_wait(str(folder))):
        yield


@contextlib.contextmanager
def _sensible(run: str) -> Iterator[None]:
    """Around what reads or applies a set: one that makes no sense can only be damaged. Raises HostError."""
    try:
        yield
    except ValueError as exc:
        raise HostError(f"cannot use the changes of run {run}", f"they are damaged: {exc}", "Run it again") from exc


@contextlib.contextmanager
def applying(run: str) -> Iterator[None]:
    """Mark that a run's changes are being applied, so that `recover_all` finds what is left. Its folder is locked."""
    marker = private_dir(all_runs() / APPLYING) / run
    marker.touch(mode=0o600)
    try:
        yield
    finally:
        # Unless something was in the way of undoing it: then the next command tries again.
        folder = marker.parent.parent / run / "changes"
        if not _pending(folder):
            marker.unlink(missing_ok=True)


def _places(folder: Path) -> list[Path]:
    """The folders of a run's changes in which something may be half applied, as far as they are there."""
    every = (folder, *_later(folder))
    return [place for part in every for place in (part, part / "undoing") if place.is_dir()]


def _pending(folder: Path) -> bool:
    from x07_sandbox.files.journal import pending

    return any(map(pending, _places(folder)))


def recover_all(progress: Callable[[str], None]) -> None:
    """Undo or finish what killed commands left half applied; what cannot be is told, and tried again next time."""
    root = runs_dir(state_dir())
    try:
        names = [path.name for path in (root / APPLYING).iterdir()]
    except OSError:
        return
    from x07_sandbox.files.apply import recover

    for name in names:
        folder = root / name / "changes"
        if not RUN_NAME.fullmatch(name) or not folder.is_dir():
            (root / APPLYING / name).unlink(missing_ok=True)
            continue
        if any(map(is_locked, _places(folder))):  # by a process that is applying
            continue
        try:
            for place in _places(folder):
                recover(place)
        except SandboxError as exc:
            progress(f"{exc} The journal is below {folder}.")
            continue
        with contextlib.suppress(OSError), folder_to_remove(folder) as free:  # else another has begun meanwhile
            if free and not _pending(folder):
                (root / APPLYING / name).unlink(missing_ok=True)
