"""Snapshots of sandboxes, and sandboxes that start from them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from x07_sandbox.errors import ArgumentError, BackendError, Command, SandboxError, UsageError, whole_number
from x07_sandbox.reports.sandboxes import SnapshotRow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from x07_sandbox.backends.base import Kept, Snapshots

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
        return [_described(kept) for _, kept in _all()]

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


def _all(*, paused: bool = False) -> Iterator[tuple[Snapshots, Kept]]:
    from x07_sandbox.backends.registry import BY_NAME, create

    for backend in map(create, BY_NAME):
        if (snapshots := backend.snapshots) is not None:
            yield from ((snapshots, kept) for kept in snapshots.kept() if kept.note.paused == paused)


def _found(word: str) -> tuple[Snapshots, Kept]:
    what, fix = f"cannot find snapshot {word}", ("To list all snapshots: ", Command("x07 snapshot list"))
    if not isinstance(word, str) or not word:
        raise ArgumentError("cannot find the snapshot", "its id is empty, or not a str", "Pass its id or its name")
    every = [*_all()]
    found = [one for one in every if one[1].note.name == word][-1:]
    found = found or [one for one in every if len(word) >= _ID_LEAST and one[1].note.id.startswith(word)]
    if len(found) != 1:
        why = f"{len(found)} ids start with it" if found else "none has this id, or this name"
        raise UsageError(what, why, fix, code="no-such-snapshot")
    return found[0]


def resume(run: str) -> None:
    """Let a sandbox that was paused go on, in a process of its own. Raises SandboxError."""
    from x07_sandbox.host.waiting import Cancel
    from x07_sandbox.library.held import create
    from x07_sandbox.library.held_messages import Create

    found = next((one for one in _all(paused=True) if one[1].note.sandbox == run), None)
    if found is None:
        why = "its snapshot was removed"
        raise BackendError("cannot resume the sandbox", why, "Open a new sandbox", code="no-such-snapshot")
    backend, kept = found
    with contextlib.closing(Cancel()) as cancel:
        create(Create({"snapshot": kept.folder}, None, flags=False), cancel.fd)
    with contextlib.suppress(OSError):
        backend.drop(kept.folder)


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
