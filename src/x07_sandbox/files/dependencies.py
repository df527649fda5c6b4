"""The dependencies among changes: which changes must be left out together."""

import itertools
import posixpath
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Final

from msgspec.structs import replace

from x07_sandbox.files.changes import Change, ChangeSet, Node, Refused, RootChanges, is_folder, parent_folders
from x07_sandbox.files.copy import DEPTH_MAX

_EMPTY: Final = "empty"


def with_dependents(changes: Sequence[Change], refused: Iterable[str]) -> set[str]:
    """Return *refused* and the names of all changes that depend on one of them.

    A change depends on the changes of the folders above it, and on the other half of its rename. A link also depends on
    the changes in its target's path.
    """
    refused = set(refused)
    by_name = {change.name: change for change in changes}
    dependents, below = _dependents(changes, by_name.keys() | refused)
    left, staying = set[str](), set[str]()
    todo = list(refused)
    while todo:
        name = todo.pop()
        if name in left:
            continue
        left.add(name)
        todo += dependents[name] + below[name]
        there = by_name.get(name)
        for folder in _above(name) if there is not None and there.before is not None else ():
            if folder not in staying and folder in by_name and removes_folder(by_name[folder]):
                staying.add(folder)
                todo += dependents[folder]
    return left | staying


def _dependents(
    changes: Sequence[Change], names: AbstractSet[str]
) -> tuple[defaultdict[str, list[str]], defaultdict[str, list[str]]]:
    dependents, below = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
    for name, other in renames(changes):
        dependents[name].append(other)
    for change in changes:
        for folder in filter(names.__contains__, _above(change.name)):
            below[folder].append(change.name)
        if change.after is not None and change.after.kind == "link":
            for part in filter(names.__contains__, _link_path(change.name, change.after.target)):
                dependents[part].append(change.name)
    return dependents, below


def with_new_parents(changes: Iterable[Change], names: AbstractSet[str]) -> set[str]:
    """Return *names* and the new folders, which replace nothing, above those that are not deleted."""
    changes = tuple(changes)
    parents = parent_folders(change.name for change in changes if change.name in names and change.after is not None)
    return {*names, *(one.name for one in changes if one.name in parents and one.before is None)}


def unmet(root: RootChanges, selected: AbstractSet[str]) -> tuple[str, str] | None:
    """Return a *selected* name of *root* and another changed name that it needs; None if nothing is missing.

    A name needs the change that makes a folder above it, and the removal of a folder those of the names in it. A link
    needs the changes of links and folders in its target's path: with the old ones it might lead to a place that was not
    checked.
    """
    every = (*root.changes, *root.left_out)
    others = {change.name: change for change in every if change.name not in selected}
    holding = {folder: name for name in others for folder in _above(name)}
    made = {name for name, other in others.items() if is_folder(other.after) and not is_folder(other.before)}
    for change in every if others else ():
        after = change.after if change.name in selected else None
        way = _link_path(change.name, after.target) if after is not None and after.kind == "link" else ()
        needed = [name for name in way if name in others and _redirects(others[name])]
        above = _above(change.name) if after is not None else ()
        needed += filter(made.__contains__, above)
        if change.name in selected & holding.keys() and removes_folder(change):
            needed.append(holding[change.name])
        if needed:
            return change.name, needed[0]
    return None


def applicable(root: RootChanges, is_overridden: Callable[[Refused], bool]) -> tuple[Change, ...]:
    """Return the left-out changes of *root* that are allowed if the overridden reasons are ignored."""
    refused = {refusal.name for refusal in root.refused if not is_overridden(refusal)}
    left_out = with_dependents((*root.changes, *root.left_out), refused)
    return tuple(change for change in root.left_out if change.name not in left_out)


def with_later_applied(changes: ChangeSet, done: AbstractSet[tuple[str, str]]) -> ChangeSet:
    """Return the set after moving those left-out changes that were applied (*done*: root, name) to the regular ones."""
    roots = []
    for root in changes.roots:
        now = [change for change in root.left_out if (root.root, change.name) in done]
        names = {change.name for change in now}
        roots.append(
            replace(
                root,
                changes=tuple(sorted((*root.changes, *now), key=lambda change: change.name)),
                left_out=tuple(change for change in root.left_out if change.name not in names),
                refused=tuple(refusal for refusal in root.refused if refusal.name not in names),
            )
        )
    return replace(changes, roots=tuple(roots))


def _above(name: str) -> Iterator[str]:
    while name := name.rpartition("/")[0]:
        yield name


def removes_folder(change: Change) -> bool:
    """Return whether a folder is deleted, or replaced by a file or a link."""
    return is_folder(change.before) and not is_folder(change.after)


def _redirects(change: Change) -> bool:
    """Return whether a link or a folder stops being what it was."""
    is_kept = is_folder(change.before) and is_folder(change.after)
    return change.before is not None and change.before.kind != "file" and not is_kept


def renames(changes: Iterable[Change]) -> Iterator[tuple[str, str]]:
    """Yield each pair of a removed name and a new name with the same content, in both directions.

    A folder or an empty file counts as renamed only if the last part of the name is the same.
    """
    gone: dict[tuple[str, ...], list[str]] = defaultdict(list)
    new: dict[tuple[str, ...], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for change in changes:
        before, after = _content(change.before), _content(change.after)
        if before and change.after is None:
            gone[before].append(change.name)
        elif after and after != before:
            new[after][posixpath.basename(change.name)].append(change.name)
    for content, names in gone.items():
        found = new[content]
        others = []
        for name in names:  # files in a renamed folder keep their names
            if same := found[posixpath.basename(name)]:
                other = same.pop()
                yield from ((name, other), (other, name))
            elif content[0] != _EMPTY:
                others.append(name)
        for name, other in zip(others, itertools.chain(*found.values()), strict=False):
            yield from ((name, other), (other, name))


def _content(node: Node | None) -> tuple[str, ...] | None:
    if node is None:
        return None
    if node.kind == "folder" or (node.kind == "file" and not node.size):
        return _EMPTY, node.kind
    return node.kind, node.sha256, node.target


def _link_path(name: str, target: str) -> Iterator[str]:
    end = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
    parts = end.split("/")[:DEPTH_MAX]  # no entry that is checked lies deeper
    for count in range(1, len(parts) + 1):
        yield "/".join(parts[:count])
