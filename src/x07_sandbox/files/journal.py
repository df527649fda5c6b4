"""The journal of the steps that apply a change set, so that x07 can roll back or finish them after a kill.

The journal is one of three files in the set's private folder. `staging` is written while staging folders are filled,
before anything else changes. `journal` is written once all steps are known; recovery then rolls back. `committed` is
written once all steps are done; recovery then publishes the undo set and removes the staged old content. The first line
of each file is a `Head`, every other line a `Step`.
"""

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
from x07_sandbox.host.paths import closing_fd, replace_file

Phase = Literal["staging", "journal", "committed"]
StepKind = Literal["mode", "remove", "replace", "add"]
_PHASES: Final[tuple[Phase, ...]] = ("committed", "journal", "staging")  # the later one counts
_VERSION: Final = 1


class Place(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A folder of the host in which steps are carried out. staging, staged: name and inode of its staging folder."""

    path: str
    ident: Ident
    staging: str
    staged: Ident | None = None


class Head(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The first line of a journal: the run, and the folders in which its steps are carried out."""

    version: Literal[1] = _VERSION
    run: str
    places: tuple[Place, ...]


class Step(msgspec.Struct, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """One operation on one name.

    kind: the operation. `mode`: the inode *old* gets new_mode. `remove`: the old inode moves to the slot.
    `replace`: the old inode and the inode in the slot change places. `add`: the inode in the slot moves to the name.
    place: index into Head.places.
    name: relative to the place; "." is the place itself.
    slot: a name in the staging folder of the place.
    new: the staged inode.
    new_folder: whether the staged inode is a folder.
    old, old_mode, before: the inode, mode and node that the name had before the step.
    undo_at: offset of the old content in the data of the undo set; -1 if it is not saved.
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


def write(folder: Path, phase: Phase, head: Head, steps: Iterable[Step] = ()) -> None:
    """Write the file of a phase. Raises OSError.

    `staging` records the names of the staging folders and, once these exist, their inodes. `journal` records the steps,
    before the first one is carried out. The text is ASCII, because names may be invalid UTF-8.
    """
    values = (msgspec.to_builtins(value) for value in (head, *steps))
    lines = (json.dumps(value, separators=(",", ":")).encode("ascii") + b"\n" for value in values)
    replace_file(folder / phase, b"".join(lines), sync=True)
    _sync_folder(folder)


def commit(folder: Path) -> None:
    """Mark all steps as done. If this function raises OSError, nothing is committed."""
    (folder / "journal").rename(folder / "committed")
    # If a power cut loses the rename, recovery rolls everything back. That is no reason to roll back now.
    with contextlib.suppress(OSError):
        _sync_folder(folder)


def committed(folder: Path) -> bool:
    """Return whether the steps are committed."""
    return (folder / "committed").exists()


def pending(folder: Path) -> bool:
    """Return whether the folder has a journal, which means that its steps must be rolled back or finished."""
    return any((folder / phase).exists() for phase in _PHASES)


def remove(folder: Path) -> None:
    """Remove the journal. Raises OSError."""
    for phase in reversed(_PHASES):
        for path in (folder / phase, *folder.glob(f".{phase}.*")):  # and what a killed replace_file() left
            path.unlink(missing_ok=True)


def read(folder: Path) -> tuple[Phase, Head, list[Step]] | None:
    """Return the last phase and its file's content, or None if there is no journal. Raises OSError, HostError."""
    for phase in _PHASES:
        with contextlib.suppress(FileNotFoundError), (folder / phase).open("rb") as file:
            try:
                return phase, _decode(next(file), Head), [_decode(line, Step) for line in file]
            except (ValueError, StopIteration) as exc:
                fix = "Check the folders .x07-apply-* at the paths in the journal, then remove the journal"
                raise HostError(f"cannot read the journal {folder / phase}", str(exc), fix) from exc
    return None


def _decode(line: bytes, model: type[_Line]) -> _Line:
    return msgspec.convert(json.loads(line), prepared(model))


def _sync_folder(folder: Path) -> None:
    with closing_fd(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
        os.fsync(fd)
