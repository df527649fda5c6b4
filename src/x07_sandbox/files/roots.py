"""Roots: the folders and files of the host that a policy opens, and their grouping into trees for copying."""

import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import msgspec

from x07_sandbox.errors import Flag, UsageError
from x07_sandbox.host.paths import collapse_leading_slashes
from x07_sandbox.options import BY_FLAG, GRANTS
from x07_sandbox.policy.guest import guest_path, is_below
from x07_sandbox.policy.model import Policy


class Root(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A folder or file of the host that the program may use.

    field: the policy field or flag that lists it. given: the path as listed. host, guest: its absolute paths.
    """

    field: str
    given: str
    host: str
    guest: str
    write: bool


class Mount(msgspec.Struct, frozen=True, kw_only=True):
    """A tree, or its part *sub*, mounted at *at* in the guest. missing: it is not on the host. single: it is a file."""

    sub: str
    at: str
    host: str
    write: bool
    missing: bool
    single: bool = False


class Tree(msgspec.Struct, frozen=True, kw_only=True):
    """The folder *host*, which is copied in one piece. only: the only file to copy from it; "" for all files."""

    host: str
    only: str
    mounts: tuple[Mount, ...]


def roots_of(policy: Policy, base: Path, start: str) -> tuple[Root, ...]:
    """Return a policy's roots, with relative paths below *base*. Roots that the plan refuses are left out."""
    if not policy.fs.enabled:
        return ()
    found = []
    for field, names in (("fs.read_roots", policy.fs.read_roots), ("fs.write_roots", policy.fs.write_roots)):
        for given in names:
            guest, _ = guest_path(given, start, deny_hidden=policy.fs.deny_hidden)
            if guest is not None:
                host = collapse_leading_slashes(os.path.normpath(base / given))
                found.append(Root(field=field, given=given, host=host, guest=guest, write=field == "fs.write_roots"))
    return tuple(found)


def trees_of(roots: Sequence[Root]) -> tuple[Tree, ...]:
    """Group the roots into trees. A root inside another one is copied once, and write access wins. Raises UsageError.

    No part of a path may be a link, because links can be redirected. A missing write root needs an existing parent
    folder.
    """
    states = {root.host: _look(root) for root in roots}
    tops: list[str] = []
    for host in sorted(states):
        if not any(is_below(host, top) and states[top] == "folder" for top in tops):
            tops.append(host)
    trees = []
    for top in tops:
        inner = [root for root in roots if root.host == top or (states[top] == "folder" and is_below(root.host, top))]
        base, only = (str(Path(top).parent), Path(top).name) if states[top] == "file" else (top, "")
        trees.append(Tree(host=base, only=only, mounts=_mounts(inner, base, states)))
    return tuple(trees)


def _mounts(roots: Iterable[Root], base: str, states: dict[str, str]) -> tuple[Mount, ...]:
    writable = [root.host for root in roots if root.write]
    found: dict[str, Mount] = {}
    for root in sorted(roots, key=lambda root: (len(PurePosixPath(root.guest).parts), root.guest)):
        write = any(root.host == host or is_below(root.host, host) for host in writable)
        sub = "" if root.host == base else os.path.relpath(root.host, base)
        state = states[root.host]
        found[root.guest] = Mount(
            sub=sub, at=root.guest, host=root.host, write=write, missing=state == "missing", single=state == "file"
        )
    return tuple(found.values())


def mounts_of(trees: Sequence[Tree]) -> list[tuple[int, Mount]]:
    """Return the mounts and the indexes of their trees. Outer mounts come first, so that no mount covers another.

    A root that is visible through another mount gets no mount: a mount point cannot be replaced or removed (EBUSY).
    """
    every = [(number, mount) for number, tree in enumerate(trees) for mount in tree.mounts]
    every.sort(key=lambda one: (one[1].at.count("/"), one[1].at))
    return [one for one in every if not _is_shown(one, every)]


def _is_shown(one: tuple[int, Mount], every: Sequence[tuple[int, Mount]]) -> bool:
    number, mount = one
    around = [other for other in every if is_below(mount.at, other[1].at)]
    if not around:
        return False
    tree, outer = around[-1]
    there = f"{outer.sub}/{os.path.relpath(mount.at, outer.at)}".lstrip("/")
    return (tree, outer.write, there) == (number, mount.write, mount.sub)


def change_roots(trees: Sequence[Tree]) -> list[tuple[int, Mount]]:
    """Return the mounts whose changes are copied back, each host folder once, and the indexes of their trees."""
    found: list[tuple[int, Mount]] = []
    for number, tree in enumerate(trees):
        hosts: set[str] = set()
        for mount in sorted(tree.mounts, key=lambda mount: mount.host):
            if mount.write and not any(mount.host == host or is_below(mount.host, host) for host in hosts):
                hosts.add(mount.host)
                found.append((number, mount))
    return found


def _origin(root: Root) -> tuple[str, ...]:
    """Return the words for the flag or policy entry that names a root."""
    if root.field in BY_FLAG:
        return Flag(root.field), f" {root.given}"
    flag = next(row.flag for row in GRANTS if row.field == root.field)
    return f"{root.given} (", Flag(flag), f", or {root.field} in the policy)"


def _look(root: Root) -> str:
    """Return a root's kind: `folder`, `file` or `missing`. Raises UsageError for other kinds and paths with links."""
    out = root.field == "--out"
    what = ("cannot use ", *_origin(root)) if out else f"cannot copy {root.given} into the VM"
    path, mode = Path(root.host), 0
    for here in (*reversed(path.parents), path):
        try:
            mode = here.lstat().st_mode
        except FileNotFoundError as exc:
            if root.write and here == path:
                return "missing"
            raise UsageError(what, f"{here} does not exist", (f"Create {here}, or omit ", *_origin(root))) from exc
        except OSError as exc:
            why = f"{root.host} cannot be opened ({exc.strerror})"
            raise UsageError(what, why, "Check the path and its permissions") from exc
        if stat.S_ISLNK(mode):
            raise UsageError(what, f"{here} is a symbolic link", f"Use the path {os.path.realpath(root.host)}")
    if stat.S_ISREG(mode) and out:
        raise UsageError(what, f"{root.host} is a file", ("Use ", Flag("--out"), " with a folder"))
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UsageError(what, f"{root.host} is neither a file nor a folder", "Use the path of a file or folder")
    return "folder" if stat.S_ISDIR(mode) else "file"
