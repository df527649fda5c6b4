"""Which folders of the host a policy opens, and which of them travel together; plan/guest_paths says where to."""

from __future__ import annotations

import os
import posixpath
import stat
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import msgspec

from x07_sandbox.errors import UsageError
from x07_sandbox.host.paths import collapse_leading_slashes
from x07_sandbox.plan.guest_paths import guest_path, is_below

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from x07_sandbox.plan.confinement import Confinement
    from x07_sandbox.policy.model import Policy


class Root(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One root. field: of the policy, or the flag, that names it. given: as it stands there. host, guest: its place."""

    field: str
    given: str
    host: str
    guest: str
    write: bool


class Mount(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a tree in the guest. sub: the part, "" for all of it. at: its place there. host: on the host.

    missing: it is not there on the host. single: it is a file.
    """

    sub: str
    at: str
    host: str
    write: bool
    missing: bool
    single: bool = False


class Tree(msgspec.Struct, frozen=True, kw_only=True):
    """What travels as one. host: the folder from which names go. only: the name there of a root that is one file."""

    host: str
    only: str
    mounts: tuple[Mount, ...]


def roots_of(policy: Policy, base: Path, start: str) -> tuple[Root, ...]:
    """The roots that a policy opens, relative ones below *base*. The plan refuses what has no place in the guest."""
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
    """The roots as trees: what lies in another travels with it, once, and write wins. Raises UsageError.

    Every folder on the way to a root must be a real one: a link would lead wherever whoever can change it wants. A
    write root need not be there, if the folder that it is to lie in is.
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


def mounts_of(trees: Sequence[Tree], listed: Confinement) -> list[tuple[int, Mount]]:
    """What is to be mounted, outer ones first, so that none covers another, with the number of its tree.

    What lies where another one shows it anyway is none: the program could neither replace nor remove it (EBUSY). A file
    that a list of programs names is one: in a mount of its own it can be written and executed.
    """
    every = [(number, mount) for number, tree in enumerate(trees) for mount in tree.mounts]
    every.sort(key=lambda one: (one[1].at.count("/"), one[1].at))
    return [one for one in every if _is_listed(one[1], listed) or not _is_shown(one, every)]


def _is_listed(mount: Mount, listed: Confinement) -> bool:
    """Whether an entry names a file that may be written, and not a folder that it lies in: that is open anyway."""
    if not mount.single or not mount.write:
        return False
    folder, part = posixpath.split(mount.at)
    starts = (posixpath.split(prefix) for prefix in listed.prefixes)
    return mount.at in (listed.programs or ()) or any(
        start and at == folder and part.startswith(start) for at, start in starts
    )


def _is_shown(one: tuple[int, Mount], every: Sequence[tuple[int, Mount]]) -> bool:
    number, mount = one
    around = [other for other in every if is_below(mount.at, other[1].at)]
    if not around:
        return False
    tree, outer = around[-1]
    there = f"{outer.sub}/{os.path.relpath(mount.at, outer.at)}".lstrip("/")
    return (tree, outer.write, there) == (number, mount.write, mount.sub)


def change_roots(trees: Sequence[Tree]) -> list[tuple[int, Mount]]:
    """The mounts whose changes come back, each host folder once, with the number of its tree."""
    found: list[tuple[int, Mount]] = []
    for number, tree in enumerate(trees):
        hosts: set[str] = set()
        for mount in sorted(tree.mounts, key=lambda mount: mount.host):
            if mount.write and not any(mount.host == host or is_below(mount.host, host) for host in hosts):
                hosts.add(mount.host)
                found.append((number, mount))
    return found


def _look(root: Root) -> str:
    """What is there: `folder`, `file` or `missing`. Raises UsageError for all else, and for a link on the way."""
    what = f"cannot give the program {root.given}"
    parts = PurePosixPath(root.host).parts[1:]
    mode = stat.S_IFDIR
    fd = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        for number, part in enumerate(parts):
            try:
                inner = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            except FileNotFoundError as exc:
                if root.write and number == len(parts) - 1:
                    return "missing"
                raise UsageError(what, f"there is no {root.host}", "Make it, or leave it out") from exc
            except OSError as exc:
                raise UsageError(what, f"{root.host}: {exc.strerror}", "Name a folder that you may read") from exc
            os.close(fd)
            fd = inner
            mode = os.fstat(fd).st_mode
            if stat.S_ISLNK(mode):
                link = "/" + "/".join(parts[: number + 1])
                raise UsageError(what, f"{link} is a link", f"Name the place itself: {os.path.realpath(root.host)}")
        if stat.S_ISDIR(mode):
            return "folder"
        if stat.S_ISREG(mode):
            if root.field == "--out":  # its place is a folder
                raise UsageError(what, f"{root.host} is a file", "Name a folder by --out, a file by --allow-write-root")
            return "file"
        raise UsageError(what, f"{root.host} is neither a file nor a folder", "Name one")
    finally:
        os.close(fd)
