"""The data model of change sets, and the dependencies among changes: which ones must be left out together.

A set is stored as `changes.json` (a `ChangeSet`) and `data` (the contents). Contents follow each other in `data`,
including holes. Applying a set produces another set that undoes it.
"""

import base64
import itertools
import json
import os
import posixpath
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Final, Literal

import msgspec
from msgspec.structs import replace

from x07_sandbox.errors import escaped
from x07_sandbox.host.documents import prepared

SCHEMA: Final = "x07.sandbox.changes@0.1.0"
DEPTH_MAX: Final = 256
"""The highest fs.max_depth."""
STAGING: Final = ".x07-apply-"
"""Prefix of the staging folders that exist in a root while a set is applied."""

_EMPTY: Final = "empty"


class Node(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A file, folder or link.

    mode: permission bits of a file or folder.
    target: target of a link, decoded by os.fsdecode.
    size, sha256: length and digest (64 hex digits) of a file's content.
    at: offset of the content in the change set's `data`; None if the content is not stored.
    """

    kind: Literal["file", "folder", "link"]
    mode: int = 0
    size: int = 0
    sha256: str = ""
    at: int | None = None
    target: str = ""


def same_node(one: Node | None, other: Node | None) -> bool:
    """Return whether two nodes are equal, regardless of where their contents are stored."""
    if one is other or one is None or other is None:
        return one is other
    return msgspec.structs.replace(one, at=None) == msgspec.structs.replace(other, at=None)


def is_folder(node: Node | None) -> bool:
    """Return whether a node exists and is a folder."""
    return node is not None and node.kind == "folder"


class Change(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The change of one name below a root. The name's parts are separated by '/' and decoded by os.fsdecode.

    before: the node that was copied into the VM; None if there was none.
    after: the node after the change; None if the name is removed.
    """

    name: str
    before: Node | None
    after: Node | None

    @property
    def action(self) -> Literal["added", "changed", "deleted"]:
        """The kind of change, as one word."""
        if self.before is None:
            return "added"
        return "changed" if self.after is not None else "deleted"

    @property
    def is_root_folder(self) -> bool:
        """Whether the change creates or removes the root itself, or changes its mode."""
        return not self.name and any(node is not None and node.kind == "folder" for node in (self.before, self.after))


Rule = Literal[
    "fs.deny_hidden",
    "fs.allow_symlinks",
    "fs.allow_mkdir",
    "fs.allow_remove",
    "fs.allow_rename",
    "fs.max_read_bytes",
    "fs.max_write_bytes",
    "fs.max_depth",
    "fs.read_roots",
    "secrets",
    "hide",
    "protected",
    "reserved",
    "kind",
]
Flag = Literal["", "--allow-protected", "--allow-hidden", "--allow-symlinks"]


class Refused(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One reason why a change is not allowed.

    value: the value of the policy field that would allow the change; None if no value would.
    reveal: the existing name that would need --reveal; empty if there is none.
    flag: the flag of `x07 apply` that overrides this reason.
    """

    name: str
    rule: Rule
    why: str
    value: int | bool | None = None
    reveal: str = ""
    flag: Flag = ""


class RootChanges(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The changes below one folder of the host, sorted by name.

    root: the absolute path of the folder, without links.
    missing: whether the folder does not exist yet. x07 creates the folder when it applies changes below it.
    refused: the reasons why changes are not allowed. A change that only depends on a refused one has no reason here.
    left_out: changes that are saved for review but not applied.
    repositories: the folders that git treated as repositories when the changes were checked, as folded names.
    """

    root: str
    guest: str
    missing: bool
    changes: tuple[Change, ...]
    refused: tuple[Refused, ...] = ()
    left_out: tuple[Change, ...] = ()
    repositories: tuple[str, ...] = ()


class Commit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One commit. branch: one of the branches that contain it. Author and subject are those that the program chose."""

    id: str
    branch: str
    author: str
    subject: str


class Commits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The commits of a program in a git repository.

    root: the absolute path of the repository's work tree.
    branches: the last commit of each branch that has new ones. HEAD stands for commits on no branch.
    count, listed: how many commits are new, and the newest of them.
    left_out: why commits of other branches cannot be used, by branch.
    """

    root: str
    branches: dict[str, str] = {}
    count: int = 0
    listed: tuple[Commit, ...] = ()
    left_out: dict[str, str] = {}


class ChangeSet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All changes of a run, or the changes that undo them. all_or_nothing: apply nothing if any change is refused."""

    schema_version: Literal["x07.sandbox.changes@0.1.0"] = SCHEMA
    run: str
    roots: tuple[RootChanges, ...]
    all_or_nothing: bool = True
    commits: Commits | None = None

    @property
    def several_roots(self) -> bool:
        """Whether the set has changes for more than one root."""
        return sum(bool(root.changes or root.left_out or root.refused) for root in self.roots) > 1

    def count(self, action: str) -> int:
        """Return how many changes have this action, without those that create or remove a root."""
        return sum(
            change.action == action and not change.is_root_folder for root in self.roots for change in root.changes
        )


def encode(changes: ChangeSet) -> bytes:
    """Return the content of `changes.json`. The text is ASCII, because names may be invalid UTF-8."""
    return json.dumps(msgspec.to_builtins(changes), separators=(",", ":")).encode("ascii")


def decode(data: bytes) -> ChangeSet:
    """Decode the content of a `changes.json`. Raises ValueError."""
    return msgspec.convert(json.loads(data), prepared(ChangeSet))


def display_name(root: str, name: str, *, several_roots: bool) -> str:
    """Return a name for messages: relative to *root*, or absolute for the root itself or if there are several roots."""
    return escaped(name if name and not several_roots else path_of(root, name))


def in_json(name: str) -> tuple[str, str]:
    """Return a name as documents have it: its text and "", or if it is not UTF-8, escaped text and base64 of its bytes.

    No other form is exact and valid for every JSON reader: many refuse half a surrogate pair.
    """
    raw = os.fsencode(name)
    try:
        return raw.decode(), ""
    except UnicodeDecodeError:
        return escaped(name), base64.b64encode(raw).decode()


def path_of(root: str, name: str) -> str:
    """Return the absolute path of a name below a root. The empty name is the root itself."""
    return posixpath.join(root, name) if name else root


def parent_folders(names: Iterable[str]) -> set[str]:
    """Return all parent folders of *names*, without the root."""
    found: set[str] = set()
    for name in names:
        above = name.rpartition("/")[0]
        while above and above not in found:
            found.add(above)
            above = above.rpartition("/")[0]
    return found


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
