"""Folders of the scratch disk in the program's view, put there from outside: where they come from it cannot see."""

from __future__ import annotations

import contextlib
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn

from x07_sandbox.channel.frames import DENIED_MAX
from x07_sandbox.guest import confine, system
from x07_sandbox.guest.errors import JobError

if TYPE_CHECKING:
    from x07_sandbox.guest.trees import Tree

_STEPS_MAX: Final = 256  # folders and links on the way to one file


def mount_all(init: int, mounts: Sequence[tuple[str, str, bool]]) -> None:
    """Mount (source, place, writable) in the namespaces of *init*, outer ones first. Raises JobError, OSError."""
    trees = []
    for source, at, writable in mounts:
        fd = system.open_tree(source)
        system.change_mount(fd, 0 if writable else system.MS_RDONLY)
        trees.append((fd, at, os.path.isdir(source)))
    namespace = os.open(f"/proc/{init}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    told_r, told_w = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()  # for a view of the program's; ours stays as it is
    if pid == 0:
        _attach(namespace, trees, told_w)
    for fd in (namespace, told_w, *(fd for fd, _, _ in trees)):
        os.close(fd)
    told = system.read_all(told_r).decode("utf-8", "replace")
    os.waitpid(pid, 0)
    if told != "ok":
        raise JobError("mounts", 0, told or "the process that mounts ended")


class Names:
    """Paths as the program sees them: of roots; by inode, of what it may only read, and of folders with roots in them.

    They are looked up when first asked for, which is seldom.
    """

    def __init__(self, trees: Mapping[int, Tree], mounts: Sequence[Mapping[str, Any]], view: str) -> None:
        """trees: by their streams. mounts: as START has them. view: where all that the program sees is, for us."""
        self._trees = trees
        self._mounts = mounts
        self._view = view
        self._around: dict[tuple[str, int], str] | None = None
        self._paths: dict[tuple[str, int], str] | None = None
        self._led: dict[str, str] = {}

    def roots(self) -> list[str]:
        """Where they are mounted."""
        return [_text(mount["at"]) for mount in self._mounts]

    def path(self, device: str, inode: int, given: str = "") -> str:
        """The path of this inode; empty if unknown, or if *given* lies in a read root itself.

        device: its numbers in hexadecimal, as the audit has them. given: a name for it, which may be that of a link.
        """
        if self._around is None:
            self._around = dict(self._folders())
        if not given and (folder := self._around.get((device, inode))):
            return folder
        if (given and self._shows(given)) or all(device != _device(tree.folder) for tree in self._trees.values()):
            return ""
        if self._paths is None:
            self._paths = dict(self._all())
        return self._paths.get((device, inode), "")

    def follow(self, given: str) -> str:
        """What a path leads to that begins where the program may make links; empty for all else.

        It may have changed since: this is reported, and decides nothing. At most DENIED_MAX are followed.
        """
        if given not in self._led:
            if len(self._led) >= DENIED_MAX:
                return ""
            self._led[given] = self._followed(given)
        return self._led[given]

    def _followed(self, given: str) -> str:
        own = [*confine.IN_MEMORY, confine.CWD, "/x07/out"]
        own += [_text(mount["at"]) for mount in self._mounts if mount["write"]]
        if all(_below(given.strip("/"), folder.strip("/")) is None for folder in own):
            return ""
        at, linked, names = "", False, given.split("/")[::-1]
        for _ in range(_STEPS_MAX):
            if not names:
                return _text(at) if linked else ""
            if len(names) > _STEPS_MAX:
                return ""
            name = names.pop()
            if name == "..":
                at = at.rpartition("/")[0]
            elif name not in {"", "."}:
                try:
                    target = os.readlink(f"{self._view}{at}/{name}")
                except OSError:  # no link, or nothing any more
                    at = f"{at}/{name}"
                    continue
                linked = True
                names += target.split("/")[::-1]
                at = "" if target.startswith("/") else at
        return ""

    def _folders(self) -> Iterator[tuple[tuple[str, int], str]]:
        for mount in self._mounts:
            folder = os.path.dirname(mount["at"])
            with contextlib.suppress(OSError):  # it was moved
                yield (_device(self._view + folder), os.stat(self._view + folder).st_ino), _text(folder)

    def _shows(self, given: str) -> bool:
        path = given.strip("/")
        around = (mount for mount in self._mounts if _below(path, _text(mount["at"]).strip("/")) is not None)
        inner = max(around, key=lambda mount: len(mount["at"]), default=None)
        return inner is not None and not inner["write"]

    def _all(self) -> Iterator[tuple[tuple[str, int], str]]:
        for number, tree in self._trees.items():
            shown = _device(tree.folder)
            mounts = [mount for mount in self._mounts if mount["tree"] == number]
            if all(mount["write"] for mount in mounts):
                continue
            mounts.sort(key=lambda mount: -len(mount["sub"]))
            for inode, name in tree.inodes():
                # In an inner one that may be written to, another file may have its inode by now.
                for mount in mounts:
                    if (rest := _below(name, mount["sub"])) is not None:
                        if not mount["write"]:
                            yield (shown, inode), _text(posixpath.join(mount["at"], rest).rstrip("/"))
                        break


def _device(path: str | bytes) -> str:
    """That on which something lies, as the audit has it."""
    device = os.stat(path).st_dev
    return f"{os.major(device):02x}:{os.minor(device):02x}"


def _text(path: str) -> str:
    """As names of records are decoded."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _below(name: str, sub: str) -> str | None:
    """The name from a folder on, None where it is not in it; both from the top of a tree."""
    if not sub or name == sub:
        return "" if name == sub else name
    return name[len(sub) + 1 :] if name.startswith(f"{sub}/") else None


def _attach(namespace: int, trees: Sequence[tuple[int, str, bool]], told: int) -> NoReturn:
    try:
        os.setns(namespace, os.CLONE_NEWNS)
        confine.root_mode(0)
        for fd, at, folder in trees:
            if not os.path.lexists(at):
                os.makedirs(at if folder else os.path.dirname(at), exist_ok=True)
                if not folder:
                    os.close(os.open(at, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o444))
            system.move_mount(fd, at)
        confine.root_mode(system.MS_RDONLY)
        os.write(told, b"ok")
    except OSError as exc:
        os.write(told, str(exc).encode("utf-8", "backslashreplace")[:1000])
    finally:
        os._exit(0)
