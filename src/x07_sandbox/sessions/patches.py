"""What a run or a sandbox changed as a patch, with contents from the saved changes, the undo data and the host."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from x07_sandbox.files import patch
from x07_sandbox.files.changes import Node, decode, path_of, with_later_applied
from x07_sandbox.files.patch import TEXT_MAX
from x07_sandbox.sessions.result import Diff
from x07_sandbox.sessions.saved_changes import SavedChanges, summarize
from x07_sandbox.sessions.selection import below

_CHUNK: Final = 1 << 16


def diff_of(saved: SavedChanges, paths: Sequence[str] = ()) -> Diff:
    """Return the saved changes. paths: see `selection.below`."""
    found = include_applied(saved)
    found = found._replace(changes=below(found.changes, paths))
    changes = summarize(found.changes, "applied" if saved.undos else "kept", names_max=None)
    left_out = sum(len(root.left_out) for root in found.changes.roots)
    return Diff(changes=replace(changes, left_out=left_out), patch=b"".join(patch_chunks(found)))


def include_applied(kept: SavedChanges) -> SavedChanges:
    """Return *kept* with those changes included that were left out at first and applied later. Raises HostError."""
    done = kept.done() if any(root.left_out for root in kept.changes.roots) else None
    return kept if not done else kept._replace(changes=with_later_applied(kept.changes, done))


def patch_chunks(kept: SavedChanges, *, stat: bool = False) -> Iterator[bytes]:
    """Yield the patch of a run's changes in chunks of many lines. stat: yield one line for each change instead."""
    chunk = bytearray()
    for line in (patch.summarize if stat else patch.patch)(
        kept.changes, _Before(kept), partial(_after, kept.folder / "data")
    ):
        chunk += line
        if len(chunk) >= _CHUNK:
            yield bytes(chunk)
            chunk.clear()
    if chunk:
        yield bytes(chunk)


def _after(path: Path, _root: str, _name: str, node: Node) -> bytes | None:
    """Return the new content of a file, or None if the content is not saved or is too large for a patch."""
    if node.at is None or node.size > TEXT_MAX:
        return None
    with path.open("rb") as file:
        return os.pread(file.fileno(), node.size, node.at)


class _Before:
    """Reader of the old contents of files: from the host if the file is unchanged there, else from the undo data."""

    def __init__(self, kept: SavedChanges) -> None:
        self._at: dict[tuple[str, str], tuple[Path, int]] = {}
        for place in kept.undos:
            with contextlib.suppress(OSError, ValueError):  # no undo data
                undoing = decode((place / "undo/changes.json").read_bytes())
                for root in undoing.roots:
                    for change in root.changes:
                        if change.after is not None and change.after.at is not None:
                            self._at[root.root, change.name] = place / "undo/data", change.after.at

    def __call__(self, root: str, name: str, node: Node) -> bytes | None:
        if node.size > TEXT_MAX:
            return None
        found = _matching(Path(path_of(root, name)), 0, node)
        if found is None and (root, name) in self._at:
            found = _matching(*self._at[root, name], node)
        return found


def _matching(path: Path, at: int, node: Node) -> bytes | None:
    """Return the content of *node* from the offset *at* of a file, or None if the bytes there have another digest."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        data = os.pread(fd, node.size, at)
    except OSError:
        return None
    finally:
        os.close(fd)
    return data if hashlib.sha256(data).hexdigest() == node.sha256 else None
