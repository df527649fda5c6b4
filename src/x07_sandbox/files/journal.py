"""The journal of an application: the steps to take, so that a killed run can be rolled back or finished.

It is one of three files in the private folder of a set: `staging` while staging folders are filled (nothing else was
touched), `journal` once all steps are known (roll back), and `committed` once all are done (publish the undo set, then
remove what was displaced). The first line is a `Head`, every other one a `Step`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Literal, TypeVar

import msgspec

from x07_sandbox.errors import HostError
from x07_sandbox.files.changes import Node
from x07_sandbox.files.inode import Ident
from x07_sandbox.host.decoding import prepared

Phase = Literal["staging", "journal", "committed"]
StepKind = Literal["mode", "remove", "replace", "add"]
_PHASES: Final[tuple[Phase, ...]] = ("committed", "journal", "staging")  # the later one counts
_PART: Final = ".part"
_VERSION: Final = 1


class Place(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A folder of the host in which steps are done.

    staging: the name of the staging folder in it. staged: the inode of that folder.
    """

    path: str
    ident: Ident
    staging: str
    staged: Ident | None = None


class Head(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The run and the places of its steps."""

    version: Literal[1] = _VERSION
    run: str
    places: tuple[Place, ...]


class Step(msgspec.Struct, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """One operation on one name.

    kind: mode (the inode old gets new_mode), remove (what is there moves to slot), replace (it changes places with what
        is in slot), or add (what is in slot moves there).
    place: index into Head.places. name: relative to it, "." for itself. slot: a name in its staging folder.
    new: the staged inode; new_folder: whether it is a folder. old, old_mode, before: what was there.
    undo_at: offset of its content in the data of the undo set; -1 for none.
    """

    kind: StepKind
    place: int
    name: str
    slot: str = ""
    new: Ident | None = None
    new_folder: bool = False
    old: Ident | None = None
    old_mode: int = 0
    new_mode: int = 0
    before: Node | None = None
    undo_at: int = -1


_Line = TypeVar("_Line", Head, Step)


def write_staging(folder: Path, head: Head) -> None:
    """Record the names of the staging folders, and once they exist their inodes. Raises OSError."""
    _write(folder, "staging", head, ())


def write_steps(folder: Path, head: Head, steps: Iterable[Step]) -> None:
    """Record the steps, before the first one is taken. Raises OSError."""
    _write(folder, "journal", head, steps)


def commit(folder: Path) -> None:
    """Mark all steps as done. Nothing is committed if it raises OSError."""
    (folder / "journal").rename(folder / "committed")
    # A power cut may lose the rename, and then all is rolled back. That is no reason to roll back now.
    with contextlib.suppress(OSError):
        _sync_folder(folder)


def committed(folder: Path) -> bool:
    """Return whether the steps are committed."""
    return (folder / "committed").exists()


def pending(folder: Path) -> bool:
    """Return whether there is something to roll back or to finish."""
    return any((folder / phase).exists() for phase in _PHASES)


def remove(folder: Path) -> None:
    """Remove the journal. Raises OSError."""
    for phase in reversed(_PHASES):
        for name in (phase, phase + _PART):
            (folder / name).unlink(missing_ok=True)


def read(folder: Path) -> tuple[Phase, Head, list[Step]] | None:
    """Return the latest phase, and what was written for it. Raises HostError if it is invalid, OSError."""
    for phase in _PHASES:
        with contextlib.suppress(FileNotFoundError), (folder / phase).open("rb") as file:
            try:
                return phase, _decode(next(file), Head), [_decode(line, Step) for line in file]
            except (ValueError, StopIteration) as exc:
                fix = "Look for folders called .x07-apply-* in the places that it names, then remove the journal"
                raise HostError(f"cannot read the journal {folder / phase}", str(exc), fix) from exc
    return None


def _decode(line: bytes, model: type[_Line]) -> _Line:
    return msgspec.convert(json.loads(line), prepared(model))


def _write(folder: Path, phase: Phase, head: Head, steps: Iterable[Step]) -> None:
    part = folder / (phase + _PART)
    part.unlink(missing_ok=True)
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        for value in (head, *steps):
            file.write(_encode(value))
        file.flush()
        os.fsync(fd)
    part.rename(folder / phase)
    _sync_folder(folder)


def _encode(value: msgspec.Struct) -> bytes:
    """Return one line in ASCII, since names need not be UTF-8."""
    return json.dumps(msgspec.to_builtins(value), separators=(",", ":")).encode("ascii") + b"\n"


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
