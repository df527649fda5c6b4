"""The platform on which the agent runs: a virtual machine (`machine`), or a shared kernel (`process`, `container`)."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NoReturn

from x07_sandbox.channel.egress import RESOLV_CONF
from x07_sandbox.guest import confine, system
from x07_sandbox.guest.system import JobError
from x07_sandbox.guest.trees import Tree

if TYPE_CHECKING:
    from x07_sandbox.channel.messages import Exec, Open, Seed
    from x07_sandbox.guest.audit import Audit, NoAudit
    from x07_sandbox.guest.cgroup import NoGroup
    from x07_sandbox.guest.confine import JobSettings, Steps
    from x07_sandbox.guest.dns import NoNetwork
    from x07_sandbox.guest.relay import RelayProcess


class Platform(ABC):
    """The operations of the agent that depend on the platform.

    program_uid: owner of the program's files; None if agent and program are the same user to the kernel.
    scratch: folder for files of any size. memory: folder for small files; this may be the same folder.
    machine_id: path of the file that the program sees as /etc/machine-id.
    channel_out_fd: a separate descriptor for writing to the channel, or None.
    filtered: whether programs run under seccomp filters. namespaces: whether programs have their own namespaces.
    user_fd: the user namespace in which programs are root, or -1. program_root: see `confine.World`.
    """

    confinement: Steps
    program_uid: int | None
    scratch: str
    memory: str
    machine_id: str
    channel_out_fd: int | None = None
    filtered: bool
    namespaces: bool
    user_fd = -1
    program_root = ""

    @abstractmethod
    def open_channel(self) -> int:
        """Harden the agent's surroundings, and open the channel. Raises OSError, JobError."""

    @abstractmethod
    def make_folders(self) -> None:
        """Make `scratch`, `memory`, and the folder of `machine_id`. Raises OSError, JobError."""

    def folder(self, name: str) -> str:
        """Return the path of the job folder *name*: in, out, work or trees."""
        return f"{self.scratch}/{name}"

    def make_job_folder(self, name: str, *, of_program: bool) -> None:
        """Make a job folder, which the program's user owns if *of_program*. Raises OSError."""
        path = self.folder(name)
        os.mkdir(path, 0o755)
        if of_program and self.program_uid is not None:
            os.chown(path, self.program_uid, self.program_uid)

    def tree(self, number: int) -> Tree:
        """Make a folder on the scratch disk for a tree of host files. Raises OSError."""
        name = f"trees/{number}"
        self.make_job_folder(name, of_program=True)
        return Tree(self.folder(name), self.program_uid)

    def work_tree(self) -> Tree:
        """Return a tree in the private working folder, for the input files there. Raises OSError."""
        return Tree(self.folder("work"), self.program_uid)

    def mount(self, init: int, mounts: Sequence[tuple[str, str, bool]]) -> None:
        """Mount (source, mount point, writable) in init's namespace, outer folders first. Raises JobError, OSError."""
        mount_all(init, mounts, writable_root=self.user_fd >= 0)

    def become_rooted(self) -> None:
        """Make the next environment one whose programs are root. Raises JobError, OSError."""
        raise JobError("root", 0, "this platform has no root for programs")

    def reading(self) -> AbstractContextManager[None]:
        """Return a context in which files written by the program can be read."""
        return nullcontext()

    @abstractmethod
    def relay(self, netns_fd: int) -> RelayProcess:
        """Start the relay in a network namespace. Raises OSError, JobError."""

    def no_network(self, netns_fd: int) -> NoNetwork | None:  # noqa: ARG002
        """Start what observes attempts to connect without a network. Return None if this platform cannot."""
        return None

    def make_resolv_conf(self, text: str = RESOLV_CONF) -> None:
        """Write the /etc/resolv.conf that programs see. Raises OSError."""
        with open(confine.RESOLV_CONF, "w", encoding="ascii") as file:
            file.write(text)

    @abstractmethod
    def audit(self) -> Audit | NoAudit:
        """Return the audit records of denied calls. Raises OSError."""

    @abstractmethod
    def group(self) -> NoGroup:
        """Return a control group for a program. Raises OSError."""

    def resource_limits(self, settings: JobSettings) -> tuple[tuple[int, int], ...]:
        """Return the limits of each process of a command, as (RLIMIT number, value)."""
        return confine.resource_limits(settings)

    @abstractmethod
    def seed(self, seed: Seed) -> None:
        """Apply the time and the entropy of a SEED message. Raises OSError."""

    def adapt(self, opening: Open) -> Open:
        """Return *opening*, adapted to this platform. Raises JobError if the platform does not support it."""
        return opening

    def adapt_command(self, order: Exec) -> Exec:
        """Return *order*, adapted to this platform."""
        return order

    @abstractmethod
    def end(self) -> None:
        """End the machine or process."""


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
