"""Snapshots of sandboxes, and paused sandboxes, which go on from one."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from x07_sandbox.errors import (
    ArgumentError,
    BackendError,
    Command,
    ImageError,
    RefusedError,
    SandboxError,
    UsageError,
    whole_number,
)
from x07_sandbox.reports.sandboxes import SnapshotRow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from x07_sandbox.backends.base import Kept, Snapshots
    from x07_sandbox.sessions.result import ChangesChoice, Result

_T = TypeVar("_T")
FORKS_MAX: Final = 256
_ID_LEAST: Final = 4


class Snapshot(SnapshotRow, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A snapshot of a sandbox, from which others start: `Sandbox(snapshot=...)`.

    id, name: by which it is found; the name may be empty. sandbox: the id of the sandbox. created_unix_ms: when it was
    taken, in milliseconds since 1970. image: the digest of the image. bytes: its size on the disk.
    """

    @staticmethod
    def list() -> Sequence[Snapshot]:
        """Return this user's snapshots, oldest first. Raises SandboxError."""
        return [_described(kept) for _, kept in _all("kept")]

    @staticmethod
    def find(word: str) -> Snapshot:
        """Return the snapshot with this id, start of an id, or name. Raises UsageError."""
        return _described(_found(word)[1])

    def remove(self) -> None:
        """Remove the snapshot. Sandboxes that have started from it go on. Raises SandboxError."""
        from x07_sandbox.host.paths import raised_as  # importing this module is cheap

        backend, kept = _found(self.id)
        with raised_as(BackendError, "cannot remove the snapshot", "Try again"):
            backend.drop(kept.folder)


def _described(kept: Kept) -> Snapshot:
    note = kept.note
    return Snapshot(
        id=note.id,
        name=note.name,
        sandbox=note.sandbox,
        created_unix_ms=note.created_unix_ms,
        image=kept.image,
        bytes=kept.bytes,
    )


def _all(keep: Literal["kept", "paused"]) -> Iterator[tuple[Snapshots, Kept]]:
    from x07_sandbox.backends.registry import BY_NAME, create

    for backend in map(create, BY_NAME):
        if (snapshots := backend.snapshots) is not None:
            yield from ((snapshots, kept) for kept in snapshots.kept() if kept.note.keep == keep)


def _found(word: str) -> tuple[Snapshots, Kept]:
    what, fix = f"cannot find snapshot {word}", ("To list all snapshots: ", Command("x07 snapshot list"))
    if not isinstance(word, str) or not word:
        raise ArgumentError("cannot find the snapshot", "its id is empty, or not a str", "Pass its id or its name")
    every = [*_all("kept")]
    found = [one for one in every if one[1].note.name == word][-1:]
    found = found or [one for one in every if len(word) >= _ID_LEAST and one[1].note.id.startswith(word)]
    if len(found) != 1:
        why = f"{len(found)} ids start with it" if found else "none has this id, or this name"
        raise UsageError(what, why, fix, code="no-such-snapshot")
    return found[0]


def resume(run: str) -> None:
    """Let a sandbox that was paused go on, in a process of its own. Raises SandboxError.

    It is RefusedError with the code OUTDATED if the sandbox never can: see `close_lost`.
    """
    import shutil

    from x07_sandbox.host.waiting import Cancel
    from x07_sandbox.library.held import create
    from x07_sandbox.library.held_messages import Create
    from x07_sandbox.records.runs import all_runs
    from x07_sandbox.sessions.host_files import AT_PAUSE
    from x07_sandbox.sessions.snapshots import OUTDATED

    def lost(why: str) -> RefusedError:
        fix = ("To close it and save the changes that it had made: ", Command(f"x07 sandbox close {run}"))
        return RefusedError("cannot resume the sandbox", why, fix, code="snapshot-outdated")

    if (found := _paused(run)) is None:
        raise lost("its snapshot was removed")
    backend, kept = found
    with contextlib.closing(Cancel()) as cancel:
        try:
            create(Create({"snapshot": kept.folder}, None, flags=False), cancel.fd)
        except (RefusedError, ImageError) as exc:
            if isinstance(exc, RefusedError) and exc.code != OUTDATED:
                raise
            raise lost(exc.why) from exc
    shutil.rmtree(all_runs() / run / AT_PAUSE, ignore_errors=True)
    with contextlib.suppress(OSError):
        backend.drop(kept.folder)


def _paused(run: str) -> tuple[Snapshots, Kept] | None:
    return next((one for one in _all("paused") if one[1].note.sandbox == run), None)


def close_lost(run: str, choice: ChangesChoice, error: SandboxError) -> Result:
    """Close a paused sandbox whose VM cannot go on (`resume`). Return its result. Raises SandboxError.

    The changes that it had when it was paused are saved, as after a run that did not end by itself.
    """
    import shutil

    import msgspec
    from msgspec.structs import replace

    from x07_sandbox.host.paths import replace_file
    from x07_sandbox.records.runs import SANDBOX, all_runs, record_of
    from x07_sandbox.sessions.host_files import AT_PAUSE, CHANGES
    from x07_sandbox.sessions.result import Changes, Draft
    from x07_sandbox.sessions.run import ended, store_result, verdict_of
    from x07_sandbox.sessions.saved_changes import find_saved, has_commits, summarize

    folder, record = all_runs() / run, record_of(run)
    draft = Draft(run)
    if record is not None:
        draft.set(backend=record.backend)
        draft.set_digests(image=record.image)
        draft.deny(*record.left_out)
    changes = Changes()
    if choice != "discard" and (folder / AT_PAUSE / "changes.json").is_file():
        (folder / AT_PAUSE).rename(folder / CHANGES)
        saved = find_saved(run).changes
        if has_commits(saved) or any(root.changes for root in saved.roots):
            changes = summarize(saved, "kept", error.why)
        else:
            shutil.rmtree(folder / CHANGES)
    shutil.rmtree(folder / AT_PAUSE, ignore_errors=True)
    draft.set(changes=changes)
    result = ended(draft.result, verdict_of(error))
    store_result(folder, result)
    if record is not None:
        replace_file(folder / SANDBOX, msgspec.json.encode(replace(record, paused="")))
    if (found := _paused(run)) is not None:
        with contextlib.suppress(OSError):
            found[0].drop(found[1].folder)
    return result


def folder_of(snapshot: object) -> Path:
    """Return the folder of a snapshot: of one of this process, or of a kept one. Raises UsageError."""
    if isinstance(snapshot, Path):
        return snapshot
    return _found(snapshot.id if isinstance(snapshot, Snapshot) else snapshot)[1].folder  # type: ignore[arg-type]


def checked_count(count: Any) -> int:  # noqa: ANN401 - it is checked
    """Return a number of forks. Raises ArgumentError."""
    error = ArgumentError("cannot fork the sandbox", f"count is {count!r}", f"Pass a number from 1 to {FORKS_MAX}")
    return whole_number(count, error, 1, FORKS_MAX)


def started(count: int, start: Callable[[], _T], end: Callable[[_T], object]) -> list[_T]:
    """Call *start* for each of *count* forks, and return them. If one fails, call *end* for the others.

    Raises what *start* raises, with the number of the fork.
    """
    from concurrent.futures import ThreadPoolExecutor

    from x07_sandbox.host.linux import cores

    with ThreadPoolExecutor(min(count, cores())) as threads:
        waiting = [threads.submit(start) for _ in range(count)]
    errors = [one.exception() for one in waiting]
    if not any(errors):
        return [one.result() for one in waiting]
    for one, error in zip(waiting, errors, strict=True):
        if error is None:
            end(one.result())
    number, error = next((number, error) for number, error in enumerate(errors, 1) if error is not None)
    if isinstance(error, SandboxError):
        error.args = (f"fork {number} of {count} could not be started", f"{error.what}: {error.why}", error.fix)
    raise error
