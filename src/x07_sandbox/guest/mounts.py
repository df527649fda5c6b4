"""Mounting folders from the scratch disk where the program sees them, and reporting paths as the program sees them."""

from __future__ import annotations

import contextlib
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NoReturn

from x07_sandbox.channel.messages import DENIED_MAX
from x07_sandbox.guest import confine, system
from x07_sandbox.guest.system import JobError

if TYPE_CHECKING:
    from x07_sandbox.channel.messages import Mount
    from x07_sandbox.guest.trees import Tree

_STEPS_MAX: Final = 256  # folders and links on the way to one file


def mount_all(init: int, mounts: Sequence[tuple[str, str, bool]], *, writable_root: bool) -> None:
    """Mount (source, mount point, writable) in init's namespace, outer folders first. Raises JobError, OSError."""
    trees = []
    for source, at, writable in mounts:
        fd = system.open_tree(source)
        system.change_mount(fd, 0 if writable else system.MS_RDONLY)
        trees.append((fd, at, os.path.isdir(source)))
    namespace = os.open(f"/proc/{init}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    status_r, status_w = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()  # a child, since setns would change our own view
    if pid == 0:
        _attach(namespace, trees, status_w, 0 if writable_root else system.MS_RDONLY)
    for fd in (namespace, status_w, *(fd for fd, _, _ in trees)):
        os.close(fd)
    status = system.read_all(status_r).decode("utf-8", "replace")
    os.waitpid(pid, 0)
    if status != "ok":
        raise JobError("mounts", 0, status or "the mounting process ended")


class ProgramPaths:
    """Paths as the program sees them, for reports of denials. The tables are built on first use, which is rare."""

    def __init__(self, trees: Mapping[int, Tree], mounts: Sequence[Mount], view: str) -> None:
        """Store the trees by number, the mounts of the session, and the program's root folder as the agent sees it."""
        self._trees = trees
        self._mounts = mounts
        self._view = view
        self._parents: dict[tuple[str, int], str] | None = None
        self._paths: dict[tuple[str, int], str] | None = None
        self._targets: dict[str, str] = {}

    def roots(self) -> list[str]:
        """Return the mount points."""
        return [_text(mount.at) for mount in self._mounts]

    def path(self, device: str, inode: int, name: str = "") -> str:
        """Return the path of an inode. Return "" if the path is unknown, or if *name* already is in a read-only mount.

        device: "major:minor" in hexadecimal, as in audit records. name: a known path of the inode, or of a link to it.
        """
        if self._parents is None:
            self._parents = dict(self._parent_folders())
        if not name and (folder := self._parents.get((device, inode))):
            return folder
        in_tree = any(device == _device(tree.folder) for tree in self._trees.values())
        if not in_tree or (name and self._in_read_only_root(name)):
            return ""
        if self._paths is None:
            self._paths = dict(self._read_only_paths())
        return self._paths.get((device, inode), "")

    def link_target(self, path: str) -> str:
        """Return *path* with its links resolved if the program may have made them, else "". For reports only."""
        if path not in self._targets:
            if len(self._targets) >= DENIED_MAX:
                return ""
            self._targets[path] = self._resolve(path)
        return self._targets[path]

    def _resolve(self, path: str) -> str:
        writable = [*confine.IN_MEMORY, confine.CWD, "/x07/out"]
        writable += [_text(mount.at) for mount in self._mounts if mount.write]
        if all(_below(path.strip("/"), folder.strip("/")) is None for folder in writable):
            return ""
        at, is_link, names = "", False, path.split("/")[::-1]
        for _ in range(_STEPS_MAX):
            if not names:
                return _text(at) if is_link else ""
            if len(names) > _STEPS_MAX:
                return ""
            name = names.pop()
            if name == "..":
                at = at.rpartition("/")[0]
            elif name not in {"", "."}:
                try:
                    target = os.readlink(f"{self._view}{at}/{name}")
                except OSError:  # not a link, or removed
                    at = f"{at}/{name}"
                    continue
                is_link = True
                names += target.split("/")[::-1]
                at = "" if target.startswith("/") else at
        return ""

    def _parent_folders(self) -> Iterator[tuple[tuple[str, int], str]]:
        for mount in self._mounts:
            folder = os.path.dirname(mount.at)
            with contextlib.suppress(OSError):  # it was moved
                yield (_device(self._view + folder), os.stat(self._view + folder).st_ino), _text(folder)

    def _in_read_only_root(self, path: str) -> bool:
        path = path.strip("/")
        around = (mount for mount in self._mounts if _below(path, _text(mount.at).strip("/")) is not None)
        inner = max(around, key=lambda mount: len(mount.at), default=None)
        return inner is not None and not inner.write

    def _read_only_paths(self) -> Iterator[tuple[tuple[str, int], str]]:
        for number, tree in self._trees.items():
            device = _device(tree.folder)
            mounts = [mount for mount in self._mounts if mount.tree == number]
            if all(mount.write for mount in mounts):
                continue
            mounts.sort(key=lambda mount: -len(mount.sub))
            for inode, name in tree.inodes():
                # The innermost mount decides: in a writable one, another file may have this inode by now.
                for mount in mounts:
                    if (rest := _below(name, mount.sub)) is not None:
                        if not mount.write:
                            yield (device, inode), _text(posixpath.join(mount.at, rest).rstrip("/"))
                        break


def _device(path: str | bytes) -> str:
    device = os.stat(path).st_dev
    return f"{os.major(device):02x}:{os.minor(device):02x}"


def _text(path: str) -> str:
    """Decode a path in the same way as paths in audit records."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _below(name: str, sub: str) -> str | None:
    """Return *name* relative to the folder *sub*, or None if *name* is not below it."""
    if not sub or name == sub:
        return "" if name == sub else name
    return name[len(sub) + 1 :] if name.startswith(f"{sub}/") else None


def _attach(namespace: int, trees: Sequence[tuple[int, str, bool]], status_fd: int, root_flags: int) -> NoReturn:
    try:
        os.setns(namespace, os.CLONE_NEWNS)
        confine.root_mode(0)
        for fd, at, folder in trees:
            if not os.path.lexists(at):
                os.makedirs(at if folder else os.path.dirname(at), exist_ok=True)
                if not folder:
                    os.close(os.open(at, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o444))
            system.move_mount(fd, at)
        confine.root_mode(root_flags)
        os.write(status_fd, b"ok")
    except OSError as exc:
        os.write(status_fd, str(exc).encode("utf-8", "backslashreplace")[:1000])
    finally:
        os._exit(0)
