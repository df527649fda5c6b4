"""Functions that show, apply and revert the changes of a run."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from x07_sandbox.errors import ArgumentError, SandboxError
from x07_sandbox.options import keyword
from x07_sandbox.sessions.patches import diff_of
from x07_sandbox.sessions.result import Changes, Diff, Result
from x07_sandbox.sessions.saved_changes import find_saved, summarize, undo_saved
from x07_sandbox.sessions.selection import Grants, apply_selected, select_changes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from x07_sandbox.sessions.saved_changes import SavedChanges


def diff(run: str | Result, paths: Sequence[str] = ()) -> Diff:
    """Return what a run changed. run: its result, or its id.

    paths: names or patterns, absolute or relative to a folder granted to the run: show these and what is below them.
    Raises SandboxError.
    """
    with _saved(run, paths=paths) as saved:
        return diff_of(saved, paths)


def apply(
    run: str | Result,
    *,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    allow_protected: Sequence[str] = (),
    allow_hidden: bool = False,
    allow_symlinks: bool = False,
) -> Changes:
    """Apply saved changes of a run, all or none of those selected. Return the changes that were applied now.

    only, skip: names or patterns, as for `diff`. Changes that are not applied stay saved, and can be applied later.
    With *only*, nothing else is changed, except that new folders around the selected names are created.
    allow_protected: patterns of protected names. allow_hidden, allow_symlinks: whether to apply left-out hidden files
    and symbolic links. Raises SandboxError, for example if files on the host changed since the run copied them.
    """
    with _saved(run, only=only, skip=skip, allow_protected=allow_protected) as saved:
        flags = {"--allow-hidden": allow_hidden, "--allow-symlinks": allow_symlinks}
        grants = Grants(protected=tuple(allow_protected), flags=frozenset(flag for flag in flags if flags[flag]))
        changes = select_changes(
            saved.changes, skip, grants, only=only, applied=saved.done() if saved.applied else None
        )
        return summarize(apply_selected(saved, changes, lambda _path: None), "applied", names_max=None)


def undo(run: str | Result) -> Changes:
    """Revert the changes of a run that were applied last, all or none. Return the changes that were reverted.

    Raises SandboxError, for example if files were changed after the changes had been applied.
    """
    with _saved(run) as saved:
        return summarize(undo_saved(saved, lambda _path: None), "kept", names_max=None)


@contextlib.contextmanager
def _saved(run: str | Result, **lists: Sequence[str]) -> Iterator[SavedChanges]:
    """Yield the saved changes of a run. Check the arguments that are lists. Errors name keywords instead of flags."""
    for name, words in lists.items():
        if isinstance(words, str | bytes) or not all(isinstance(word, str) and word for word in words):
            fix = 'Pass a list, such as ["src"]'
            raise ArgumentError("cannot select changes", f"{name} is not a list of names", fix)
    name = run.run if isinstance(run, Result) else str(run)
    if not name:
        raise ArgumentError("cannot find a run", "its id is empty", "Pass the result of the run")
    try:
        yield find_saved(name)
    except SandboxError as exc:
        exc.word_for(keyword)
        raise
