"""The platform on which the agent runs: a virtual machine (`machine`), or a shared kernel (`process`, `container`)."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from x07_sandbox.channel.egress import RESOLV_CONF
from x07_sandbox.guest.mounts import mount_all
from x07_sandbox.guest.system import JobError
from x07_sandbox.guest.trees import Tree

if TYPE_CHECKING:
    from x07_sandbox.channel.messages import Exec, Open, Seed
    from x07_sandbox.guest.audit import Audit, NoAudit
    from x07_sandbox.guest.cgroup import NoGroup
    from x07_sandbox.guest.confine import Confinement, JobSettings
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

    confinement: Confinement
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
        from x07_sandbox.guest import confine

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
        from x07_sandbox.guest import confine

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
