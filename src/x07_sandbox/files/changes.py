"""The data model of change sets. A set is stored as `changes.json` (a `ChangeSet`) and `data` (the contents).

Contents follow each other in `data`, including holes. Applying a set produces another set that undoes it.
"""

import base64
import json
import os
import posixpath
from collections.abc import Iterable
from typing import Final, Literal

import msgspec

from x07_sandbox.errors import escaped
from x07_sandbox.host.decoding import prepared

SCHEMA: Final = "x07.sandbox.changes@0.1.0"
STAGING: Final = ".x07-apply-"
"""Prefix of the staging folders that exist in a root while a set is applied."""


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


class ChangeSet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All changes of a run, or the changes that undo them. all_or_nothing: apply nothing if any change is refused."""

    schema_version: Literal["x07.sandbox.changes@0.1.0"] = SCHEMA
    run: str
    roots: tuple[RootChanges, ...]
    all_or_nothing: bool = True

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
