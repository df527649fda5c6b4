"""Changes of a tree of files, as data: what was there, what is there now, and where the new content lies.

A set of changes is kept as two files: `changes.json`, this module's `ChangeSet`, and `data`, the contents of all new
files one after the other, with holes where they have holes. Applying one makes another, which undoes it.
"""

from __future__ import annotations

import json
import posixpath
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from x07_sandbox.host.decoding import known

if TYPE_CHECKING:
    from collections.abc import Iterable

SCHEMA: Final = "x07.sandbox.changes@0.1.0"
STAGING: Final = ".x07-apply-"
"""What the names of our own folders in a root begin with, while a set is applied."""


class Node(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What may be under a name. mode: permission bits of a file or folder.

    size, sha256 (64 hex digits): of a file's bytes. at: where they begin in `data`, if they are there.
    target: of a link, as the bytes that os.fsencode gives.
    """

    kind: Literal["file", "folder", "link"]
    mode: int = 0
    size: int = 0
    sha256: str = ""
    at: int | None = None
    target: str = ""

    def same(self, other: Node | None) -> bool:
        """Whether both are the same thing; wherever a content lies."""
        return other is not None and msgspec.structs.replace(self, at=None) == msgspec.structs.replace(other, at=None)


class Change(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One name below a root, parts divided by '/'; bytes that are no UTF-8 as os.fsdecode makes them.

    before: what was copied into the machine there, None for nothing. after: what is to be there.
    """

    name: str
    before: Node | None
    after: Node | None

    @property
    def action(self) -> Literal["added", "changed", "deleted"]:
        """In a word."""
        if self.before is None:
            return "added"
        return "changed" if self.after is not None else "deleted"

    @property
    def is_root_folder(self) -> bool:
        """Whether it is about the folder whose entries all others are."""
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
    "protected",
    "reserved",
    "kind",
]
Flag = Literal["", "--allow-protected", "--allow-hidden", "--allow-symlinks"]


class Refused(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One reason why a change may not be done.

    value: what would have to stand in the policy, None where nothing would do. reveal: a name that was taken for one of
    a secret, and lies there; empty for none. flag: of `x07 apply`, which applies the change in spite of this reason.
    """

    name: str
    rule: Rule
    why: str
    value: int | bool | None = None
    reveal: str = ""
    flag: Flag = ""


class RootChanges(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Changes below one folder of the host.

    root: its absolute path, without a link on the way. missing: it was not there, and is made if it is to hold
    something. changes: sorted by name. left_out: changes that are kept for review and not applied with the others.
    refused: why some may not be done, sorted by name, all reasons of each; what only depends on one has none.
    """

    root: str
    guest: str
    missing: bool
    changes: tuple[Change, ...]
    refused: tuple[Refused, ...] = ()
    left_out: tuple[Change, ...] = ()


class ChangeSet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of a run, or what undoes it. all_or_nothing: while anything is refused, nothing is applied."""

    schema_version: Literal["x07.sandbox.changes@0.1.0"] = SCHEMA
    run: str
    roots: tuple[RootChanges, ...]
    all_or_nothing: bool = True

    @property
    def several_roots(self) -> bool:
        """Whether something of more than one root is told of."""
        return sum(bool(root.changes or root.left_out or root.refused) for root in self.roots) > 1

    def count(self, action: str) -> int:
        """How many there are of one action. That a root itself is made, or goes again, is none."""
        return sum(
            change.action == action and not change.is_root_folder for root in self.roots for change in root.changes
        )


def encode(changes: ChangeSet) -> bytes:
    """As `changes.json`, in ASCII: names need not be UTF-8, and msgspec writes no lone surrogates."""
    return json.dumps(msgspec.to_builtins(changes), separators=(",", ":")).encode("ascii")


def decode(data: bytes) -> ChangeSet:
    """The way back. Raises ValueError (msgspec.ValidationError is one)."""
    return msgspec.convert(json.loads(data), known(ChangeSet))


def display_name(root: str, name: str, *, several_roots: bool) -> str:
    """A name for people: below its root, or the whole path where it is the root, or several roots are told of."""
    return printable(name if name and not several_roots else path_of(root, name))


def path_of(root: str, name: str) -> str:
    """The absolute path of a name below a root, or of the root itself."""
    return posixpath.join(root, name) if name else root


def parent_folders(names: Iterable[str]) -> set[str]:
    """All folders above these, the root left out; each is met once."""
    found: set[str] = set()
    for name in names:
        above = name.rpartition("/")[0]
        while above and above not in found:
            found.add(above)
            above = above.rpartition("/")[0]
    return found


def printable(name: str) -> str:
    """A name as text that can be written anywhere: bytes that are no UTF-8 as escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
