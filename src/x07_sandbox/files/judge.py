"""What of the changes that a guest tells of may be done on the host: pure, on names and digests only.

The net difference is judged: what a program made and removed again is nobody's business. One entry that may not be
done keeps the whole set back, and each is named.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Final

import msgspec

from x07_sandbox.errors import PeerError
from x07_sandbox.files.changes import Change, Node, Refused
from x07_sandbox.files.copy import stays_inside

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from x07_sandbox.files.copy import Bounds
    from x07_sandbox.files.incoming import Told
    from x07_sandbox.files.protected import Protection

_SPECIAL_BITS: Final = 0o7000


class Allowed(msgspec.Struct, frozen=True, kw_only=True):
    """What a policy allows to be done to folders and names."""

    mkdir: bool
    remove: bool
    rename: bool


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """changes: all of a root, sorted by name. refused: those of them that may not be done."""

    changes: tuple[Change, ...]
    refused: tuple[Refused, ...]


def judge(
    before: Mapping[str, Node], told: Iterable[Told], bounds: Bounds, allowed: Allowed, protection: Protection
) -> Judged:
    """Judge what was told of one root. before: what was copied into it, by name from the root.

    Raises PeerError where it contradicts itself, which an honest guest's never does.
    """
    after, refused = _after(before, told)
    # The root's own mode is not below it.
    changes = [
        Change(name=name, before=before.get(name), after=after.get(name))
        for name in sorted({*before, *after})
        if not _same(before.get(name), after.get(name)) and (name or not _is_folder(after.get(name)))
    ]
    judged = {refusal.name: refusal for refusal in refused}
    moved = _moved(changes)
    for change in changes:
        refusal = _by_name(change, bounds, protection) or _by_kind(change, bounds) or _by_deed(change, allowed, moved)
        if refusal is not None and change.name not in judged:
            judged[change.name] = refusal
    written = [change.name for change in changes if change.after is not None]
    for name, why in protection.repositories(after, written).items():
        judged.setdefault(name, Refused(name=name, rule="protected", why=why))
    return Judged(changes=tuple(changes), refused=tuple(judged[name] for name in sorted(judged)))


def _is_folder(node: Node | None) -> bool:
    return node is not None and node.kind == "folder"


def _same(one: Node | None, other: Node | None) -> bool:
    return one is other or (one is not None and one.same(other))


def _after(before: Mapping[str, Node], told: Iterable[Told]) -> tuple[dict[str, Node], list[Refused]]:
    """What is to be there, and what of it no tree can hold."""
    after = dict(before)
    refused: list[Refused] = []
    heard: set[str] = set()
    for one in told:
        if one.name in heard and one.other is None:
            raise PeerError("bad changes", "something is told of twice")
        heard.add(one.name)
        if one.other is not None:
            refused.append(Refused(name=one.name, rule="kind", why=_what(one.other)))
            after.pop(one.name, None)
        elif one.node is not None:
            after[one.name] = one.node
        elif after.pop(one.name, None) is None:
            raise PeerError("bad changes", "what was never there is said to be gone")
    others = {refusal.name for refusal in refused}
    for name in after:
        above = name.rpartition("/")[0]
        if above and above not in others and (above not in after or after[above].kind != "folder"):
            raise PeerError("bad changes", "something lies in what is no folder")
    return after, refused


def _what(mode: int) -> str:
    kinds = {0o1: "a pipe", 0o2: "a character device", 0o6: "a block device", 0o14: "a socket"}
    kinds |= {0o4: "too deep to be named", 0o10: "a file with extended attributes"}
    return f"it is {kinds.get(mode >> 12, 'of no kind that a tree holds')}"


def _by_name(change: Change, bounds: Bounds, protection: Protection) -> Refused | None:
    name = change.name
    if why := protection.why(name):
        return Refused(name=name, rule="protected", why=why)
    if bounds.deny_hidden and any(part.startswith(".") for part in name.split("/")):
        why = "its name begins with a dot, and fs.deny_hidden is true"
        return Refused(name=name, rule="fs.deny_hidden", why=why, value=False)
    depth = name.count("/") + 1
    if depth > bounds.depth:
        return Refused(name=name, rule="fs.max_depth", why="it lies too deep", value=depth)
    return None


def _by_kind(change: Change, bounds: Bounds) -> Refused | None:
    name, node = change.name, change.after
    if node is None:
        return None
    if node.kind == "link":
        if not bounds.allow_symlinks:
            return Refused(name=name, rule="fs.allow_symlinks", why="it is a link", value=True)
        if not stays_inside(name, node.target):
            return Refused(name=name, rule="fs.allow_symlinks", why="it is a link that leads out of its root")
    elif node.mode & _SPECIAL_BITS:
        return Refused(name=name, rule="kind", why="it has a set-id or sticky bit")
    elif node.kind == "file" and node.size > bounds.write_bytes:
        return Refused(name=name, rule="fs.max_write_bytes", why="it is too large", value=node.size)
    return None


def _by_deed(change: Change, allowed: Allowed, moved: set[str]) -> Refused | None:
    name, before, after = change.name, change.before, change.after
    if _is_folder(after) and not _is_folder(before) and not allowed.mkdir:
        return Refused(name=name, rule="fs.allow_mkdir", why="it is a new folder", value=True)
    lost = before is not None and (after is None or after.kind != before.kind)
    if not lost or allowed.remove:
        return None
    if name in moved:
        if allowed.rename:
            return None
        return Refused(name=name, rule="fs.allow_rename", why="it was given another name", value=True)
    return Refused(name=name, rule="fs.allow_remove", why="it was removed", value=True)


def _moved(changes: Iterable[Change]) -> set[str]:
    """Names whose content is there under a new one, each new one for one old; and folders whose all is there."""
    new: dict[tuple[str, int, str], int] = defaultdict(int)
    for change in changes:
        if change.before is None and (key := _key(change.after)):
            new[key] += 1
    moved: set[str] = set()
    folders: set[str] = set()
    lost: set[str] = set()
    for change in changes:
        if change.after is not None or change.before is None:
            continue
        key = _key(change.before)
        if key and new[key] > 0:
            new[key] -= 1
            moved.add(change.name)
        elif change.before.kind == "folder":
            folders.add(change.name)
        else:
            lost.add(change.name)
    stay = {above for name in lost for above in _above(name)}
    emptied = {above for name in moved for above in _above(name)}
    return moved | ((folders & emptied) - stay)


def _key(node: Node | None) -> tuple[str, int, str] | None:
    if node is None or node.kind == "folder":
        return None
    return node.sha256, node.size, node.target


def _above(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]
