"""What the agent runs in: a virtual machine (`machine`), or a process on somebody else's kernel (`process`)."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from x07_sandbox.guest.mounts import mount_all
from x07_sandbox.guest.trees import Tree

if TYPE_CHECKING:
    from collections.abc import Sequence

    from x07_sandbox.guest.audit import Audit, NoAudit
    from x07_sandbox.guest.cgroup import NoGroup
    from x07_sandbox.guest.confine import Confinement
    from x07_sandbox.guest.relay_process import RelayProcess


class Platform(ABC):
    """One kind of surroundings.

    confinement: the steps of the confinement.
    program_uid: owner of the program's files; None where agent and program are one user to the kernel.
    scratch: folder for files of any size. memory: folder for small ones, which may be the same.
    machine_id: path of the file that the program sees as /etc/machine-id.
    channel_out_fd: where the channel is written to; None where it is read from the same descriptor.
    filtered: whether programs run under seccomp filters. namespaces: whether they have namespaces of their own.
    """

    confinement: Confinement
    program_uid: int | None
    scratch: str
    memory: str
    machine_id: str
    channel_out_fd: int | None = None
    filtered: bool
    namespaces: bool

    @abstractmethod
    def open_channel(self) -> int:
        """Take the confinement that concern the agent, and open the channel. Raises OSError, JobError."""

    @abstractmethod
    def make_folders(self) -> None:
        """Make `scratch`, `memory`, and the folder of `machine_id`, once. Raises OSError, JobError."""

    def folder(self, name: str) -> str:
        """Where a folder of a place lies: in, out, work or trees."""
        return f"{self.scratch}/{name}"

    def make_place_folder(self, name: str, *, of_program: bool) -> None:
        """Make one of these; of_program: owned by the program's user. Raises OSError."""
        path = self.folder(name)
        os.mkdir(path, 0o755)
        if of_program and self.program_uid is not None:
            os.chown(path, self.program_uid, self.program_uid)

    def tree(self, number: int) -> Tree:
        """A new folder on the scratch disk, of the program's, for a tree of the host's files. Raises OSError."""
        name = f"trees/{number}"
        self.make_place_folder(name, of_program=True)
        return Tree(self.folder(name), self.program_uid)

    def work_tree(self) -> Tree:
        """The program's private working folder, for files that lie in it from the start. Raises OSError."""
        return Tree(self.folder("work"), self.program_uid)

    def mount(self, init: int, mounts: Sequence[tuple[str, str, bool]]) -> None:
        """Mount (source, place, writable) in the namespaces of *init*, outer ones first. Raises JobError, OSError."""
        mount_all(init, mounts)

    def reading(self) -> AbstractContextManager[None]:
        """Around the reading of what the program wrote."""
        return nullcontext()

    @abstractmethod
    def relay(self, netns_fd: int) -> RelayProcess:
        """Start the relay in a network namespace. Raises OSError, JobError."""

    def make_resolv_conf(self) -> None:
        """Write the file that a program with connections has as /etc/resolv.conf, once. Raises OSError."""
        from x07_sandbox.guest import confine, firewall

        with open(confine.RESOLV_CONF, "x", encoding="ascii") as file:
            file.write(firewall.RESOLV_CONF)

    @abstractmethod
    def audit(self) -> Audit | NoAudit:
        """What hears of refused calls. Raises OSError."""

    @abstractmethod
    def group(self) -> NoGroup:
        """A new control group for a program, or what stands for it. Raises OSError."""

    @abstractmethod
    def seed(self, body: dict[str, Any]) -> None:
        """Use the time and entropy of a SEED frame. Raises OSError."""

    def adapt(self, body: dict[str, Any]) -> dict[str, Any]:
        """The body of START as this platform carries it out. Raises JobError where it cannot."""
        return body

    @abstractmethod
    def end(self) -> None:
        """End it, and this process with it."""
