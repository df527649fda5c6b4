"""Checks before an application changes anything: the set is valid, and the host still has the state that was copied."""

import errno
import itertools
import os
import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from x07_sandbox.errors import HostError
from x07_sandbox.files.changes import STAGING, Change, ChangeSet, Node, RootChanges, is_folder, same_node
from x07_sandbox.files.inode import OpenInode, open_inode

_SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_TARGET_MAX: Final = 4095


class Item(NamedTuple):
    """A change, and the current status of the file or folder. name: relative to the anchor of its root."""

    name: str
    change: Change
    info: os.stat_result | None


class RootState(NamedTuple):
    """The state of a root on the host. conflicts: absolute paths whose state differs from what was copied.

    applied: names of the changes that are already in effect. all_applied: whether all changes are in effect.
    """

    items: list[Item]
    conflicts: list[str]
    all_applied: bool
    applied: set[str]


def check_set(changes: ChangeSet) -> None:
    """Raise ValueError if a set describes an impossible tree or a forbidden change."""
    roots = sorted(root.root for root in changes.roots if root.changes)
    for path in roots:
        if posixpath.normpath(path) != path or not path.startswith("/") or path.startswith("//") or "\0" in path:
            raise ValueError(f"root {path!r} is not a plain absolute path")
    for one, other in itertools.pairwise(roots):
        if one == other:
            raise ValueError(f"root {one!r} appears twice")
    for root in changes.roots:
        _check_root(root)
        _check_nested(root, [path for path in roots if path.startswith(f"{root.root.rstrip('/')}/")])


def root_anchor(root: RootChanges) -> tuple[str, str]:
    """Return the folder to open for a root (its anchor), and the root's name in that folder.

    The anchor is the parent folder if the root may be created or removed, else the root itself, with the name "".
    """
    whole = next((change for change in root.changes if not change.name), None)
    stays = whole is None or (is_folder(whole.before) and is_folder(whole.after))
    if stays and not root.missing:
        return root.root, ""
    folder, name = posixpath.split(root.root)
    if not name:
        raise ValueError("the root of the file system cannot be created or removed")
    return folder, name


def compare_root(root: RootChanges, dir_fd: int, prefix: str, undo: Mapping[tuple[str, str], Change]) -> RootState:
    """Compare the host with the changes of a root. Raises HostError, OSError.

    dir_fd, prefix: the open anchor of the root, and the root's name in it.
    undo: the changes that undo the applied ones, by root and name. For a file system that does not store modes, these
    changes contain the modes that it reports.
    """
    changes = sorted(root.changes, key=lambda change: change.name)
    conflicts: list[str] = []
    if root.missing:
        changes, fits = _as_missing(changes, dir_fd, prefix)
        conflicts += [] if fits else [root.root]
    folders = {change.name for change in changes if is_folder(change.after)}
    removed = {change.name for change in changes if change.before is not None and change.after is None}
    items: list[Item] = []
    applied: set[str] = set()
    for change in changes:
        name = _below(prefix, change.name)
        try:
            with open_inode(dir_fd, name) as found:
                good = _fits(found, change.before)
                # Also if the change that reverts this one expects what is there.
                back = undo.get((root.root, change.name))
                reverts = back is not None and same_node(back.after, change.before)
                if _fits(found, change.after) or (back is not None and reverts and _fits(found, back.before)):
                    applied.add(change.name)
                items.append(Item(name, change, found.info if found else None))
                if good and found and is_folder(change.before) and not is_folder(change.after):
                    names = (posixpath.join(change.name, part) for part in found.names())
                    conflicts += [posixpath.join(root.root, part) for part in names if part not in removed]
        except OSError as exc:
            raise _unreadable(exc, posixpath.join(root.root, change.name)) from exc
        if good and change.after and found is None:
            good = _has_parent(change.name, folders, dir_fd, prefix)
        if not good:
            conflicts.append(posixpath.join(root.root, change.name).rstrip("/"))
    return RootState(items, conflicts, len(applied) == len(changes), applied)


def is_there(dir_fd: int, prefix: str, name: str) -> bool:
    """Return whether *name* below a root exists. dir_fd, prefix: see `compare_root`. Raises OSError."""
    with open_inode(dir_fd, _below(prefix, name)) as found:
        return found is not None


def with_actual_modes(root: RootChanges, dir_fd: int, prefix: str) -> RootChanges:
    """Return the undo changes of a root with the modes that the root's file system reports. Raises OSError."""
    changes = []
    for change in root.changes:
        before = change.before
        if before is not None and before.kind != "link":
            with open_inode(dir_fd, _below(prefix, change.name)) as found:
                before = msgspec.structs.replace(before, mode=found.mode & 0o777) if found else before
        changes.append(msgspec.structs.replace(change, before=before))
    return msgspec.structs.replace(root, changes=tuple(changes))


def default_mode() -> int:
    """Return the mode of a new folder. Read the umask in /proc, because umask(2) would change it for all threads."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("Umask:"):
            return 0o755 & ~int(line.split()[1], 8)
    return 0o755


def _as_missing(changes: list[Change], dir_fd: int, prefix: str) -> tuple[list[Change], bool]:
    """Return the changes, with one that creates a missing root, and whether the root is missing or an empty folder."""
    whole, rest = (changes[0], changes[1:]) if changes and not changes[0].name else (None, changes)
    with open_inode(dir_fd, prefix) as found:
        if found is None:
            created = Node(kind="folder", mode=default_mode())
            return [whole or Change(name="", before=None, after=created), *rest], True
        if found.kind != "folder":
            return changes, False
        if whole and is_folder(whole.after) and whole.before is None:
            now = Node(kind="folder", mode=found.mode & 0o777)
            rest = [msgspec.structs.replace(whole, before=now), *rest]
        elif whole:
            rest = changes
        return rest, not found.names()


def _check_root(root: RootChanges) -> None:
    by_name = {change.name: change for change in root.changes}
    if len(by_name) != len(root.changes):
        raise ValueError(f"a name appears twice below {root.root!r}")
    for change in root.changes:
        where = f"{change.name!r} below {root.root!r}"
        parts = change.name.split("/") if change.name else []
        if "\0" in change.name or any(part in {"", ".", ".."} or part.startswith(STAGING) for part in parts):
            raise ValueError(f"{where} is not a plain relative name")
        if change.after is None:
            continue
        _check_node(change.after, where)
        parent = by_name.get("/".join(parts[:-1])) if parts else None
        if parent is not None and not is_folder(parent.after):
            raise ValueError(f"{where} would lie in something that is not a folder")
        if change.after.kind == "file" and change.after.at is None and not _same_content(change):
            raise ValueError(f"{where} has no content")


def _check_nested(root: RootChanges, inner: list[str]) -> None:
    names = [f"{posixpath.relpath(path, root.root)}/" for path in inner]
    for change in root.changes if names else ():
        for name in names:
            below = f"{change.name}/"
            removes = change.name and name.startswith(below) and not is_folder(change.after)
            if below.startswith(name) or removes:
                raise ValueError(f"{change.name!r} below {root.root!r} affects the root {name!r} inside it")


def _check_node(node: Node, where: str) -> None:
    if node.mode & ~0o777 or node.mode < 0:
        raise ValueError(f"{where} has mode {node.mode:o}; only permission bits can be set")
    if node.kind == "link" and (not 0 < len(os.fsencode(node.target)) <= _TARGET_MAX or "\0" in node.target):
        raise ValueError(f"{where} has an invalid target")
    if node.kind == "file" and (node.size < 0 or (node.at or 0) < 0 or not _SHA256.fullmatch(node.sha256)):
        raise ValueError(f"{where} has an invalid content")


def _same_content(change: Change) -> bool:
    before, after = change.before, change.after
    if before is None or after is None or not before.kind == after.kind == "file":
        return False
    return (before.size, before.sha256) == (after.size, after.sha256)


def only_mode(change: Change) -> bool:
    """Return whether a change affects only the mode."""
    return _same_content(change) or (is_folder(change.before) and is_folder(change.after))


def _below(prefix: str, name: str) -> str:
    return posixpath.join(prefix, name).rstrip("/") or "."


def _fits(found: OpenInode | None, node: Node | None) -> bool:
    return found is None if node is None else found is not None and found.matches(node)


def _has_parent(name: str, folders: set[str], dir_fd: int, prefix: str) -> bool:
    parent = posixpath.dirname(name)
    if not name or parent in folders:
        return True
    with open_inode(dir_fd, _below(prefix, parent)) as found:
        good = found is not None and found.kind == "folder"
    if good:
        folders.add(parent)
    return good


def _unreadable(exc: OSError, path: str) -> HostError:
    if exc.errno == errno.EXDEV:
        fix = "Unmount that file system, or grant it as a separate folder"
        return HostError("cannot apply the changes", f"a mount point is on the path {path!a}", fix)
    fix = "Make the file readable"
    return HostError("cannot apply the changes", f"{exc.strerror or exc} ({path!a})", fix)
