"""Folders of the scratch disk in the program's view, put there from outside: where they come from it cannot see."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NoReturn

from x07_sandbox.guest import confine, system
from x07_sandbox.guest.errors import JobError

if TYPE_CHECKING:
    from collections.abc import Sequence


def mount_all(init: int, mounts: Sequence[tuple[str, str, bool]]) -> None:
    """Put each source, a path of ours, where it is told in the namespaces of *init*; outer ones come first.

    The third says whether the program may write there. Raises JobError, OSError.
    """
    trees = []
    for source, at, writable in mounts:
        fd = system.open_tree(source)
        system.mount_attributes(fd, 0 if writable else system.MS_RDONLY)
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
