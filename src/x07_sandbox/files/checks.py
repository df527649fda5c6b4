"""What is checked before anything is touched: that a set makes sense, and that the host is as it says."""

from __future__ import annotations

import errno
import itertools
import os
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from x07_sandbox.errors import HostError
from x07_sandbox.files.changes import STAGING, Change, Node
from x07_sandbox.files.inode import open_inode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from x07_sandbox.files.changes import ChangeSet, RootChanges
    from x07_sandbox.files.inode import OpenInode

_SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_TARGET_MAX: Final = 4095


class Item(NamedTuple):
    """A change of which the host is as it should be. name: below the folder that its root is reached by."""

    name: str
    change: Change
    info: os.stat_result | None


class Found(NamedTuple):
    """A root as it is on the host. wrong: absolute paths of what is not as it was.

    done: whether all is there already as it is to be; there: names of what is.
    """

    items: list[Item]
    wrong: list[str]
    done: bool
    there: set[str]


def check_set(changes: ChangeSet) -> None:
    """Refuse what no tree can be or what no change may bring. Raises ValueError."""
    roots = sorted(root.root for root in changes.roots if root.changes)
    for path in roots:
        if posixpath.normpath(path) != path or not path.startswith("/") or path.startswith("//") or "\0" in path:
            raise ValueError(f"root {path!r} is no plain absolute path")
    for one, other in itertools.pairwise(roots):
        if one == other:
            raise ValueError(f"root {one!r} is there twice")
    for root in changes.roots:
        _check_root(root)
        _check_apart(root, [path for path in roots if path.startswith(f"{root.root.rstrip('/')}/")])


def root_anchor(root: RootChanges) -> tuple[str, str]:
    """The folder that a root is reached by, and the root's name in it: itself, unless it may be made or go."""
    whole = next((change for change in root.changes if not change.name), None)
    stays = whole is None or (_kind(whole.before) == _kind(whole.after) == "folder")
    if stays and not root.missing:
        return root.root, ""
    folder, name = posixpath.split(root.root)
    if not name:
        raise ValueError("the root of the file system cannot be made or removed")
    return folder, name


def compare_root(root: RootChanges, dir_fd: int, prefix: str, undoing: Mapping[tuple[str, str], Change]) -> Found:
    """Compare the host with a root's changes. dir_fd, prefix: as reached_by() says. Raises HostError, OSError.

    undoing: what undoes what was applied, by root and name: where no modes are kept it says which one is there.
    """
    changes = sorted(root.changes, key=lambda change: change.name)
    wrong: list[str] = []
    if root.missing:
        changes, fits = _as_missing(changes, dir_fd, prefix)
        wrong += [] if fits else [root.root]
    folders = {change.name for change in changes if _kind(change.after) == "folder"}
    gone = {change.name for change in changes if change.before is not None and change.after is None}
    items: list[Item] = []
    there_already: set[str] = set()
    for change in changes:
        name = _below(prefix, change.name)
        try:
            with open_inode(dir_fd, name) as there:
                good = _fits(there, change.before, blind=True)
                if _fits(there, change.after, blind=False) or _is_applied(
                    there, change, undoing.get((root.root, change.name))
                ):
                    there_already.add(change.name)
                items.append(Item(name, change, there.info if there else None))
                if good and there and _kind(change.before) == "folder" != _kind(change.after):
                    names = (posixpath.join(change.name, part) for part in there.names())
                    wrong += [posixpath.join(root.root, part) for part in names if part not in gone]
        except OSError as exc:
            raise _unseen(exc, posixpath.join(root.root, change.name)) from exc
        if good and change.after and there is None:
            good = _may_be_made(change.name, folders, dir_fd, prefix)
        if not good:
            wrong.append(posixpath.join(root.root, change.name).rstrip("/"))
    return Found(items, wrong, len(there_already) == len(changes), there_already)


def with_actual_modes(root: RootChanges, dir_fd: int, prefix: str) -> RootChanges:
    """The same root with what is there in the modes that it has, where a file system keeps none. Raises OSError."""
    changes = []
    for change in root.changes:
        before = change.before
        if before is not None and before.kind != "link":
            with open_inode(dir_fd, _below(prefix, change.name)) as there:
                before = msgspec.structs.replace(before, mode=there.mode & 0o777) if there else before
        changes.append(msgspec.structs.replace(change, before=before))
    return msgspec.structs.replace(root, changes=tuple(changes))


def default_mode() -> int:
    """What mkdir(2) gives a folder here. Read, since to ask umask(2) sets it for all threads."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("Umask:"):
            return 0o755 & ~int(line.split()[1], 8)
    return 0o755  # before Linux 4.7


def _as_missing(changes: list[Change], dir_fd: int, prefix: str) -> tuple[list[Change], bool]:
    """The changes with that which makes the root; and whether nothing is there, or an empty folder, which may stay."""
    whole, rest = (changes[0], changes[1:]) if changes and not changes[0].name else (None, changes)
    with open_inode(dir_fd, prefix) as there:
        if there is None:
            made = Node(kind="folder", mode=default_mode())
            return [whole or Change(name="", before=None, after=made), *rest], True
        if there.kind != "folder":
            return changes, False
        if whole and _kind(whole.after) == "folder" and whole.before is None:
            now = Node(kind="folder", mode=there.mode & 0o777)
            rest = [msgspec.structs.replace(whole, before=now), *rest]
        elif whole:
            rest = changes
        return rest, not there.names()


def _check_root(root: RootChanges) -> None:
    by_name = {change.name: change for change in root.changes}
    if len(by_name) != len(root.changes):
        raise ValueError(f"a name is there twice below {root.root!r}")
    for change in root.changes:
        where = f"{change.name!r} below {root.root!r}"
        parts = change.name.split("/") if change.name else []
        if "\0" in change.name or any(part in {"", ".", ".."} or part.startswith(STAGING) for part in parts):
            raise ValueError(f"{where} is no plain relative name")
        if change.after is None:
            continue
        _check_node(change.after, where)
        parent = by_name.get("/".join(parts[:-1])) if parts else None
        if parent is not None and _kind(parent.after) != "folder":
            raise ValueError(f"{where} is to be where no folder is to be")
        if change.after.kind == "file" and change.after.at is None and not _same_content(change):
            raise ValueError(f"{where} has no content")


def _check_apart(root: RootChanges, inner: list[str]) -> None:
    """Of a root in another the outer one's changes say nothing. inner: the roots that lie in it."""
    names = [f"{posixpath.relpath(path, root.root)}/" for path in inner]
    for change in root.changes if names else ():
        for name in names:
            below = f"{change.name}/"
            goes = change.name and name.startswith(below) and _kind(change.after) != "folder"
            if below.startswith(name) or goes:
                raise ValueError(f"{change.name!r} below {root.root!r} is of the root {name!r} in it")


def _check_node(node: Node, where: str) -> None:
    if node.mode & ~0o777 or node.mode < 0:
        raise ValueError(f"{where} has mode {node.mode:o}: only permission bits can be set")
    if node.kind == "link" and (not 0 < len(os.fsencode(node.target)) <= _TARGET_MAX or "\0" in node.target):
        raise ValueError(f"{where} has no plain target")
    if node.kind == "file" and (node.size < 0 or (node.at or 0) < 0 or not _SHA256.fullmatch(node.sha256)):
        raise ValueError(f"{where} has no plain content")


def _is_applied(there: OpenInode | None, change: Change, back: Change | None) -> bool:
    """Whether a change was done with what is there, as what takes it back says. back: None where nothing does."""
    if back is None or not (back.after is change.before or (back.after and back.after.same(change.before))):
        return False
    return _fits(there, back.before, blind=False)


def _same_content(change: Change) -> bool:
    """Whether only its mode changes."""
    before, after = change.before, change.after
    if before is None or after is None or not before.kind == after.kind == "file":
        return False
    return (before.size, before.sha256) == (after.size, after.sha256)


def only_mode(change: Change) -> bool:
    """Whether a thing stays and is given another mode at the most."""
    return _same_content(change) or _kind(change.before) == _kind(change.after) == "folder"


def _kind(node: Node | None) -> str | None:
    return node.kind if node else None


def _below(prefix: str, name: str) -> str:
    return posixpath.join(prefix, name).rstrip("/") or "."


def _fits(there: OpenInode | None, node: Node | None, *, blind: bool) -> bool:
    """blind: what must not be read fits by its size and mode for now. It can be read when it was moved away."""
    if there is None or node is None:
        return there is None and node is None
    try:
        return there.matches(node)
    except PermissionError:
        return blind and there.matches(node, blind=True)


def _may_be_made(name: str, folders: set[str], dir_fd: int, prefix: str) -> bool:
    """Whether its folder is there, or is to be: then it is remembered among *folders*."""
    parent = posixpath.dirname(name)
    if not name or parent in folders:
        return True
    with open_inode(dir_fd, _below(prefix, parent)) as there:
        good = there is not None and there.kind == "folder"
    if good:
        folders.add(parent)
    return good


def _unseen(exc: OSError, path: str) -> HostError:
    """The error about what cannot be looked at."""
    if exc.errno == errno.EXDEV:
        fix = "Unmount it, or name what is mounted as a root of its own"
        return HostError("cannot apply the changes", f"a mount point lies on the way to {path!a}", fix)
    fix = "Make it readable, unless its mode is what the run changed: then bring it back by hand"
    return HostError("cannot apply the changes", f"{path!a}: {exc.strerror or exc}", fix)
