"""The journal of applying a set of changes: what is about to be done, so that a killed run can be undone or finished.

It is one of three files in a private folder, and which one says how far it came:

    staging    folders for new content are being made and filled; nothing else was touched
    journal    all steps are known, and some of them may be done: they are to be undone
    committed  all are done: what they displaced is to be kept for undo, then removed

The first line is a Head, each other one a Step.
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
Doing = Literal["mode", "remove", "replace", "add"]
_PHASES: Final[tuple[Phase, ...]] = ("committed", "journal", "staging")  # the later one counts
_PART: Final = ".part"
_VERSION: Final = 1


class Place(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A folder of the host in which steps are done. staging: the name of ours in it; staged: which one that is."""

    path: str
    ident: Ident
    staging: str
    staged: Ident | None = None


class Head(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the steps are about."""

    version: Literal[1] = _VERSION
    run: str
    places: tuple[Place, ...]


class Step(msgspec.Struct, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """One thing to do under one name.

    kind: mode   the thing old gets new_mode
          remove what is there goes to slot
          replace what is there changes places with what is in slot
          add    what is in slot goes there
    place: which of Head.places. name: relative to it, "." for itself. slot: a name in its staging folder.
    new: what is staged; new_folder: whether it is one. old, old_mode, before: what was there.
    undo_at: where its content goes in the data of what undoes it; -1 if it has none.
    """

    kind: Doing
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


def announce(folder: Path, head: Head) -> None:
    """Say which folders for staging are about to be made, or, with `staged`, which they are. Raises OSError."""
    _write(folder, "staging", head, ())


def write(folder: Path, head: Head, steps: Iterable[Step]) -> None:
    """Say what is about to be done. Raises OSError."""
    _write(folder, "journal", head, steps)


def commit(folder: Path) -> None:
    """All is done. Raises OSError, after which it is as if this had not been called."""
    (folder / "journal").rename(folder / "committed")
    # The mark is there: that it may be gone after a power cut, and all be undone then, is no reason to undo it now.
    with contextlib.suppress(OSError):
        _sync_folder(folder)


def committed(folder: Path) -> bool:
    """Whether commit() did its work."""
    return (folder / "committed").exists()


def pending(folder: Path) -> bool:
    """Whether there is something to undo or to finish."""
    return any((folder / phase).exists() for phase in _PHASES)


def forget(folder: Path) -> None:
    """There is nothing left to undo or to finish. Raises OSError."""
    for phase in reversed(_PHASES):
        for name in (phase, phase + _PART):
            (folder / name).unlink(missing_ok=True)


def read(folder: Path) -> tuple[Phase, Head, list[Step]] | None:
    """What was written last. Raises HostError if it cannot be understood, OSError."""
    for phase in _PHASES:
        with contextlib.suppress(FileNotFoundError), (folder / phase).open("rb") as file:
            try:
                return phase, _decode(next(file), Head), [_decode(line, Step) for line in file]
            except (ValueError, StopIteration) as exc:
                fix = "Look at the folders that it names for one called .x07-apply-*, then remove it"
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
    """A line in ASCII: names need not be UTF-8, and msgspec writes no lone surrogates."""
    return json.dumps(msgspec.to_builtins(value), separators=(",", ":")).encode("ascii") + b"\n"


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
