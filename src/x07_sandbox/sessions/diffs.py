"""What a run changed, or a sandbox so far, as a summary and a patch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from x07_sandbox.sessions.patches import include_applied, patch_chunks
from x07_sandbox.sessions.result import Diff
from x07_sandbox.sessions.saved_changes import summarize
from x07_sandbox.sessions.selection import below

if TYPE_CHECKING:
    from collections.abc import Sequence

    from x07_sandbox.sessions.saved_changes import SavedChanges


def diff_of(saved: SavedChanges, paths: Sequence[str] = ()) -> Diff:
    """Return the saved changes. paths: see `selection.below`."""
    found = include_applied(saved)
    found = found._replace(changes=below(found.changes, paths))
    changes = summarize(found.changes, "applied" if saved.undos else "kept", names_max=None)
    left_out = sum(len(root.left_out) for root in found.changes.roots)
    return Diff(changes=replace(changes, left_out=left_out), patch=b"".join(patch_chunks(found)))
