"""File trees as values: written to disk, read back, and compared into a change set."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import stat
import tempfile
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from x07_sandbox.files.apply import apply
from x07_sandbox.files.changes import Change, ChangeSet, Node, RootChanges, decode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

Entry = tuple[str, int, bytes]
"""Kind, mode, and the content of a file or the target of a link."""

Tree = dict[str, Entry]
"""By name below the root; "" is the root itself."""

OLD: Tree = {
    "": ("folder", 0o755, b""),
    "changed": ("file", 0o644, b"as it was"),
    "deleted": ("file", 0o600, b"goes"),
    "empty": ("file", 0o640, b""),
    "gone": ("folder", 0o755, b""),
    "gone/deep": ("folder", 0o555, b""),
    "gone/deep/file": ("file", 0o444, b"below"),
    "kept": ("file", 0o644, b"the same"),
    "link": ("link", 0, b"changed"),
    "link-to-file": ("link", 0, b"/nowhere"),
    "mode": ("file", 0o644, b"#!/bin/sh\n"),
    "open": ("folder", 0o755, b""),
    "open/changed": ("file", 0o644, b"x" * 5000),
    "to-folder": ("file", 0o644, b"a file"),
    "to-file": ("folder", 0o700, b""),
    "to-file/a": ("folder", 0o755, b""),
    "to-file/a/b": ("file", 0o644, b"deep"),
    "read-only": ("file", 0o400, b"to its owner"),
    "\udcff": ("file", 0o644, b"a name in no encoding"),
}
NEW: Tree = {
    "": ("folder", 0o750, b""),
    "added": ("file", 0o755, b"new"),
    "added-link": ("link", 0, b"../outside"),
    "added-tree": ("folder", 0o555, b""),
    "added-tree/a": ("folder", 0o755, b""),
    "added-tree/a/b": ("file", 0o444, b"read only"),
    "changed": ("file", 0o600, b"as it is"),
    "empty": ("file", 0o640, b"no longer"),
    "kept": ("file", 0o644, b"the same"),
    "link": ("link", 0, b"elsewhere"),
    "link-to-file": ("file", 0o644, b"no link"),
    "mode": ("file", 0o755, b"#!/bin/sh\n"),
    "open": ("folder", 0o555, b""),
    "open/changed": ("file", 0o644, b"y"),
    "to-folder": ("folder", 0o755, b""),
    "to-folder/a": ("folder", 0o711, b""),
    "to-folder/a/b": ("file", 0o644, b"deeper"),
    "to-file": ("file", 0o644, b"a file now"),
    "read-only": ("file", 0o644, b"to all"),
    "\udcfe": ("link", 0, b"\xff"),
}
"""Between them is every kind of change, and what only a folder's owner can do with its mode."""


def flat(mode: int, nodes: dict[str, Any], prefix: str = "") -> Tree:
    """Return a tree from nested dictionaries."""
    tree: Tree = {prefix: ("folder", mode, b"")}
    for name, node in nodes.items():
        path = f"{prefix}/{name}".lstrip("/")
        if isinstance(node[1], dict):
            tree |= flat(node[0], node[1], path)
        else:
            tree[path] = node
    return tree


def trees(names: st.SearchStrategy[str], targets: st.SearchStrategy[bytes]) -> st.SearchStrategy[Tree]:
    """Return any trees of files, folders and links with these names and targets."""
    contents = st.binary(max_size=20) | st.builds(lambda n: b"long" * n, st.integers(1000, 30_000))
    files = st.tuples(st.just("file"), st.sampled_from([0o644, 0o755, 0o600, 0o400]), contents)
    links = st.tuples(st.just("link"), st.just(0), targets)
    modes = st.sampled_from([0o755, 0o700, 0o555, 0o500])
    nodes = st.recursive(
        files | links, lambda inner: st.tuples(modes, st.dictionaries(names, inner, max_size=4)), max_leaves=12
    )
    return st.builds(flat, st.sampled_from([0o755, 0o700]), st.dictionaries(names, nodes, max_size=5))


def put(root: Path, tree: Tree) -> None:
    """Create the tree in an empty place."""
    for name, (kind, mode, data) in sorted(tree.items()):
        path = root / name
        if kind == "folder":
            path.mkdir(mode | 0o700)
        elif kind == "link":
            path.symlink_to(os.fsdecode(data))
        else:
            path.write_bytes(data)
            path.chmod(mode)
    for name, (kind, mode, _) in sorted(tree.items(), reverse=True):
        if kind == "folder":
            (root / name).chmod(mode)


def read(root: Path) -> Tree:
    """Return the tree on disk, including unreadable files."""
    found: Tree = {}
    waiting = [""]
    with contextlib.ExitStack() as opened:  # folders, until all below them is read
        while waiting:
            name = waiting.pop()
            path = root / name
            info = path.lstat()
            mode = stat.S_IMODE(info.st_mode)
            if stat.S_ISLNK(info.st_mode):
                found[name] = ("link", 0, os.fsencode(path.readlink()))
            elif stat.S_ISDIR(info.st_mode):
                found[name] = ("folder", mode, b"")
                opened.enter_context(_opened(path, mode, 0o500))
                waiting += [f"{name}/{part.name}".lstrip("/") for part in path.iterdir()]
            else:
                with _opened(path, mode, 0o400):
                    found[name] = ("file", mode, path.read_bytes())
    return found


@contextlib.contextmanager
def _opened(path: Path, mode: int, bits: int) -> Iterator[None]:
    if mode & bits != bits:
        path.chmod(mode | bits)
    yield
    if mode & bits != bits:
        path.chmod(mode)


def remove(root: Path) -> None:
    """Remove the whole tree."""
    for name, (kind, _, _) in sorted(read(root).items()):
        if kind == "folder":
            (root / name).chmod(0o700)
    for name, (kind, _, _) in sorted(read(root).items(), reverse=True):
        if kind == "folder":
            (root / name).rmdir()
        else:
            (root / name).unlink()


def difference(root: Path, old: Tree, new: Tree, *, missing: bool = False) -> tuple[ChangeSet, bytes]:
    """Return the change set that turns *old* into *new*, and its data."""
    data = bytearray()
    changes = []
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) == new.get(name):
            continue
        before, after = _node(old.get(name)), _node(new.get(name), len(data))
        data += new[name][2] if after and after.kind == "file" else b""
        changes.append(Change(name=name, before=before, after=after))
    roots = (RootChanges(root=str(root), guest="/x07/root", missing=missing, changes=tuple(changes)),)
    return ChangeSet(run="1-2-3", roots=roots), bytes(data)


def _node(entry: Entry | None, at: int | None = None) -> Node | None:
    if entry is None:
        return None
    kind, mode, data = entry
    if kind == "folder":
        return Node(kind="folder", mode=mode)
    if kind == "link":
        return Node(kind="link", target=os.fsdecode(data))
    return Node(kind="file", mode=mode, size=len(data), sha256=hashlib.sha256(data).hexdigest(), at=at)


def applied(
    changes: ChangeSet, data: bytes, folder: Path, on_wait: Callable[[str], Callable[[], None] | None] | None = None
) -> ChangeSet:
    """Apply a set whose data is in memory."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        return apply(changes, file.fileno(), folder, on_wait=on_wait)


def undone(folder: Path, other: Path | None = None) -> ChangeSet:
    """Apply the undo set of *folder*, saving it in *other* or the same folder."""
    undoing = decode((folder / "undo" / "changes.json").read_bytes())
    with (folder / "undo" / "data").open("rb") as file:
        return apply(undoing, file.fileno(), other or folder)


@contextlib.contextmanager
def full_disk(most_bytes: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size, as on a disk without room for more."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
