"""Selection and application of some of a run's saved changes."""

import fnmatch
import posixpath
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Final, NamedTuple

from msgspec.structs import replace

from x07_sandbox.errors import Command, Flag, RefusedError, Text, UsageError, listed
from x07_sandbox.files.changes import (
    ChangeSet,
    Refused,
    RootChanges,
    applicable,
    display_name,
    parent_folders,
    path_of,
    removes_folder,
    unmet,
    with_new_parents,
)
from x07_sandbox.files.protected import Protection
from x07_sandbox.sessions.refusals import flag_for
from x07_sandbox.sessions.saved_changes import SavedChanges, apply_saved

_LISTED: Final = 10


class Grants(NamedTuple):
    """Flags of `x07 apply` that allow refused changes. protected: values of --allow-protected. flags: other flags."""

    protected: tuple[str, ...] = ()
    flags: frozenset[str] = frozenset()

    @property
    def any(self) -> bool:
        """Whether any of these flags was given."""
        return bool(self.protected or self.flags)

    def is_allowed(self, root: str) -> Callable[[Refused], bool]:
        """Return a function that tells whether these flags allow a refused change in *root*."""
        protection = Protection(root, allowed=self.protected)

        def is_let(refusal: Refused) -> bool:
            if refusal.rule == "protected":
                return protection.is_allowed(refusal.name)
            return bool(refusal.flag) and refusal.flag in self.flags

        return is_let


NO_GRANTS: Final = Grants()


def select_changes(
    changes: ChangeSet,
    skip: Sequence[str],
    grants: Grants = NO_GRANTS,
    *,
    only: Sequence[str] = (),
    applied: AbstractSet[tuple[str, str]] | None = None,
    notify: Callable[[str], None] = lambda _text: None,
) -> ChangeSet:
    """Return the changes to apply: those not in *skip*, and changes that were left out and that *grants* allows.

    only, skip: paths or patterns (see `covers`); without *only*, all changes are selected. With *only*, nothing else is
    selected except the new folders around these changes. A change that needs another one which is neither selected nor
    applied (see `unmet`) is an error. A folder that contains a skipped name is kept, and *notify* gets a message.
    applied: root and name of each change applied earlier. With *applied* and *grants*, and without *only*, these are
    the left-out changes and the new folders around them.
    Raises UsageError, and RefusedError for changes that are not allowed.
    """
    roots = changes.roots
    if not changes.all_or_nothing:
        alone = applied is not None and grants.any and not only
        roots = tuple(_with_left_out(root, grants, applied or set(), alone=alone) for root in roots)
        was_left_out = any(root.left_out for root in changes.roots)
        if grants.any and was_left_out and not any(root.left_out for root in roots):
            kept = [(root.root, one) for root in changes.roots for one in root.refused]
            raise _refused([(place, one) for place, one in kept if not grants.is_allowed(place)(one)], changes)
    if only:
        _require_used(only, changes, "apply")
        roots = tuple(_only(root, only) for root in roots)
        refused = [(root.root, one) for root in below(changes, only).roots for one in root.refused]
        if refused and not any(root.changes for root in roots):
            raise _refused(refused, changes)
    parts = [_without(root, changes, skip, grants, notify) for root in roots]
    used = set[str]().union(*(used for _, used in parts))
    _require_used([word for word in skip if word not in used], changes, "skip")
    for root, (part, _) in zip(changes.roots, parts, strict=True):
        selected = {change.name for change in part.changes}
        if found := unmet(root, selected | {name for place, name in applied or () if place == root.root}):
            raise _needs(root.root, found, changes, can_add=bool(only))
    commits = None if only else changes.commits
    return replace(changes, roots=tuple(replace(root, left_out=()) for root, _ in parts), commits=commits)


def _with_left_out(
    root: RootChanges, grants: Grants, done: AbstractSet[tuple[str, str]], *, alone: bool
) -> RootChanges:
    """Return *root* without refusals, and with those left-out changes added that *grants* allows.

    alone: whether to return only these, if they are not *done*, and the new folders around them.
    """
    is_allowed = grants.is_allowed(root.root)
    more = applicable(root, lambda one: (root.root, one.name) in done or is_allowed(one)) if grants.any else ()
    changes = sorted((*root.changes, *more), key=lambda change: change.name)
    if alone:
        wanted = with_new_parents(changes, {one.name for one in more if (root.root, one.name) not in done})
        changes = [change for change in changes if change.name in wanted]
    return replace(root, changes=tuple(changes), refused=(), left_out=more)


def _only(root: RootChanges, words: Sequence[str]) -> RootChanges:
    """Return *root* with those changes that *words* cover, and the new folders around them."""
    named = {name for name in _names(root) if any(covers(word, root.root, name) for word in words)}
    wanted = with_new_parents(root.changes, named)
    return replace(
        root,
        changes=tuple(change for change in root.changes if change.name in wanted),
        refused=tuple(refusal for refusal in root.refused if refusal.name in wanted),
    )


def _names(root: RootChanges) -> set[str]:
    return {change.name for change in root.changes} | {refusal.name for refusal in root.refused}


def _refused(left: Sequence[tuple[str, Refused]], changes: ChangeSet, fix: Text = "") -> RefusedError:
    """Return the error for changes that are not allowed, given as pairs of a root and a refusal."""
    fix = fix or ("To see the reasons, and a flag for each: ", Command(f"x07 diff {changes.run}"))
    several = changes.several_roots
    lines = [f"{display_name(root, one.name, several_roots=several)} ({one.why})" for root, one in left[:_LISTED]]
    more = f", and {len(left) - _LISTED} more" if len(left) > _LISTED else ""
    return RefusedError("cannot apply the changes", "; ".join(lines) + more, fix, code="changes-refused")


def _needs(root: str, names: tuple[str, str], changes: ChangeSet, *, can_add: bool) -> RefusedError:
    """Return the error for a change that needs another one, given as the pair of their names."""
    shown = [display_name(root, name, several_roots=changes.several_roots) for name in names]
    flags = [flag_for("--only", shown[1]) if can_add else "", flag_for("--skip", shown[0])]
    named = [Flag(flag) for flag in flags if flag]
    why = f"it depends on the change of {shown[1]}, which is not selected"
    fix = listed(named, " or ") if named else (Flag("--skip"), " with a pattern")
    return RefusedError(f"cannot apply {shown[0]}", why, ("Add ", *fix), code="change-needs-another")


def apply_selected(saved: SavedChanges, selected: ChangeSet, on_wait: Callable[[str], None]) -> ChangeSet:
    """Apply those of the *selected* changes that are not applied yet, as a step that can be undone. Return them."""
    new = replace(selected, roots=(), commits=None if saved.has_fetched else selected.commits)
    if not any(root.changes for root in selected.roots):
        apply_saved(saved, replace(selected, roots=()), on_wait)  # without an undo set, which counts as an application
        return new
    done = saved.done()
    rest = [
        replace(
            root,
            changes=tuple(change for change in root.changes if (root.root, change.name) not in done),
            missing=root.missing and not any(root.root == place for place, _ in done),
        )
        for root in selected.roots
    ]
    later = bool(done) and any(root.changes for root in rest)
    part = replace(selected, roots=tuple(rest)) if later else selected
    made = apply_saved(saved, part, on_wait, later=later)
    return replace(new, roots=part.roots if made.roots else ())


def _without(
    root: RootChanges, every: ChangeSet, skip: Sequence[str], grants: Grants, notify: Callable[[str], None]
) -> tuple[RootChanges, set[str]]:
    """Return *root*, of *every*, without the skipped changes, and the entries of *skip* that matched a change."""
    names = _names(root)
    by_word = {word: {name for name in names if covers(word, root.root, name)} for word in skip}
    skipped = set[str]().union(*by_word.values())
    # Skipped files that exist stay, whether they were copied in or not, and so do the folders around these files.
    staying = [change.name for change in root.changes if change.name in skipped and change.before is not None]
    words = {word: parent_folders([word.rstrip("/").removeprefix(f"{root.root}/")]) for word in skip}
    removed = {change.name for change in root.changes if removes_folder(change)}
    holding = parent_folders(staying).union(*words.values()) & removed - skipped
    is_allowed = grants.is_allowed(root.root)
    left = [(root.root, one) for one in root.refused if one.name not in skipped | holding and not is_allowed(one)]
    if left:
        raise _refused(left, every, ("Leave them out with ", Flag("--skip")))
    for name in sorted(holding):
        shown = display_name(root.root, name, several_roots=every.several_roots)
        notify(f"kept because it contains skipped files: {shown}")
    changes = [change for change in root.changes if change.name not in skipped | holding]
    used = {word for word in skip if by_word[word] or words[word] & holding}
    return replace(root, changes=tuple(changes), refused=()), used


def covers(word: str, root: str, name: str) -> bool:
    """Whether *word*, a path or a pattern (fnmatch), matches *name* below *root*, or a folder above *name*.

    A relative *word* starts in the root. The root's last part, or `.`, stands for the root itself.
    """
    path = path_of(root, name) if word.startswith("/") else name or posixpath.basename(root)
    word = posixpath.normpath(word)
    if word in {".", path} or path.startswith(f"{word}/"):
        return True
    return bool({"*", "?", "["} & set(word)) and any(
        fnmatch.fnmatchcase(part, word) for part in (path, *parent_folders([path]))
    )


def below(changes: ChangeSet, paths: Sequence[str]) -> ChangeSet:
    """Return those changes that *paths* cover (see `covers`); all changes if there are no paths. Raises UsageError."""

    def some(root: RootChanges) -> RootChanges:
        lists = {
            key: tuple(one for one in getattr(root, key) if any(covers(word, root.root, one.name) for word in paths))
            for key in ("changes", "left_out", "refused")
        }
        return replace(root, **lists)

    _require_used(paths, changes, "show")
    return replace(changes, roots=tuple(map(some, changes.roots)), commits=None) if paths else changes


def _require_used(words: Iterable[str], changes: ChangeSet, verb: str) -> None:
    """Raise UsageError if one of *words* covers no change and no refusal."""
    for word in words:
        if not any(
            covers(word, root.root, name)
            for root in changes.roots
            for name in (*_names(root), *(change.name for change in root.left_out))
        ):
            raise UsageError(f"cannot {verb} {word}", "no change has this name", f"See x07 diff {changes.run}")
