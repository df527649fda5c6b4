"""The agent as PID 1 of a container made by an engine: root with four capabilities.

The agent cannot mount anything, so the engine mounts every folder. The program is another user in the same namespaces,
and reaches neither agent nor channel. Folders that the program may not write belong to root.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Final

from x07_sandbox.channel.trees import Entry, Kind
from x07_sandbox.guest import confine, system
from x07_sandbox.guest.cgroup import HostGroup, HostGroupsV1, NoGroup, counter
from x07_sandbox.guest.errors import JobError
from x07_sandbox.guest.process import FREE_INIT, RULES, OnSharedKernel, limits_of_child
from x07_sandbox.guest.system import write_file
from x07_sandbox.guest.trees import Tree, as_program_user

if TYPE_CHECKING:
    from x07_sandbox.channel.messages import Open

_CGROUP: Final = "/sys/fs/cgroup"
_READ_AND_ENTER: Final = 0o500
_KILLS: Final = 1000  # attempts: a zombie counts as a process until init reaps it


def _first_to_die(_world: confine.World) -> None:
    write_file("/proc/self/oom_score_adj", "1000")  # the agent, with 0, must survive to report


@contextlib.contextmanager
def _program_user() -> Iterator[None]:
    """Switch to the program's user (real and effective ids), then back to root."""
    os.setresgid(confine.UID, confine.UID, 0)
    os.setresuid(confine.UID, confine.UID, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)


def _resource_limits(settings: confine.JobSettings, *, tasks: bool = False) -> None:
    with _program_user():  # another user's process would need CAP_SYS_RESOURCE (prlimit(2))
        limits_of_child(settings, tasks=tasks)


_MACHINE_STEPS: Final = {step.name: step for step in confine.MACHINE.rights}
CONTAINED: Final = confine.Confinement(
    world=(FREE_INIT, RULES),
    rights=(
        confine.Step("first to die", "", _first_to_die),
        confine.Step(confine.NO_CAPABILITIES, "CAP_SETPCAP", confine.no_capabilities),
        *(_MACHINE_STEPS[name] for name in ("own user", "no new privileges")),
        confine.FRESH_SIGNALS,
        _MACHINE_STEPS["system calls"],
    ),
    job=(
        *(step for step in confine.VIEW if step.name == "programs"),
        confine.Step("resource limits", "CAP_SETUID, CAP_SETGID", _resource_limits, confine.RESOURCES),
    ),
)
# For runtimes that cannot limit tasks.
CONTAINED_TASKS: Final = confine.Confinement(
    world=CONTAINED.world,
    rights=CONTAINED.rights,
    job=(
        *CONTAINED.job[:-1],
        confine.Step(
            "resource limits",
            "CAP_SETUID, CAP_SETGID",
            functools.partial(_resource_limits, tasks=True),
            (*confine.RESOURCES, "tasks"),
        ),
    ),
)


class ContainerGroup(NoGroup):
    """The container's control group, read-only. The engine sets the limits, and the agent is in the group too."""

    KILLS = True

    def __init__(self) -> None:
        super().__init__(_CGROUP)
        unified = os.path.exists(f"{_CGROUP}/cgroup.controllers")
        self._counters = (HostGroup if unified else HostGroupsV1).COUNTERS
        self._cpu = ("cpu.stat", "usage_usec") if unified else ("cpuacct/cpuacct.usage",)
        self._unit = 1 if unified else 1000

    def cpu_us(self, init: int) -> int:  # noqa: ARG002
        """Return the CPU time of the container, in microseconds."""
        name, *keys = self._cpu
        return counter(f"{_CGROUP}/{name}", keys) // self._unit

    def kill(self, init: int) -> None:  # noqa: ARG002
        """Kill every process of the program's user; PID 1 ignores the signal."""
        with _program_user(), contextlib.suppress(ProcessLookupError):
            for _ in range(_KILLS):
                os.kill(-1, signal.SIGKILL)  # every process that this user may signal, until none is left
                time.sleep(0.001)


class ContainerTree(Tree):
    """A tree on the engine's mounts. mounts: True for a mount point that the program owns, False if root owns it."""

    def __init__(self, folder: str, mounts: dict[bytes, bool]) -> None:
        super().__init__(folder, None)
        self._mounts = mounts

    def _owner(self, name: bytes) -> int | None:
        around = (at for at in self._mounts if not at or name == at or name.startswith(at + b"/"))
        return confine.UID if self._mounts.get(max(around, key=len, default=b""), False) else None

    def _make(self, entry: Entry) -> None:
        owner = self._owner(entry.name)
        if owner is None:  # the program reads it as "other"
            readable = entry.mode & _READ_AND_ENTER
            entry = entry._replace(mode=entry.mode | readable >> 3 | readable >> 6)
        if entry.name in self._mounts and entry.kind is Kind.FOLDER:  # the engine made it, with its own mode
            self.folders[entry.name] = os.stat(entry.name or b".", dir_fd=self._top).st_mode & 0o7777
            return
        with as_program_user(owner):
            super()._make(entry)

    def _close_file(self) -> None:
        assert self._entry is not None  # noqa: S101 - a file is open
        with as_program_user(self._owner(self._entry.name)):
            super()._close_file()

    def _finish_folder(self, entry: Entry) -> None:
        with as_program_user(self._owner(entry.name)):
            super()._finish_folder(entry)


class Contained(OnSharedKernel):
    """A container.

    network: whether there is a relay. limits_tasks: whether the agent must limit tasks, because the runtime does not.
    """

    confinement = CONTAINED
    program_uid = confine.UID
    scratch = memory = "/x07"
    machine_id = confine.MACHINE_ID
    channel_out_fd = 1
    filtered = True
    namespaces = False

    def __init__(self, *, network: bool, limits_tasks: bool) -> None:
        super().__init__(0)
        if limits_tasks:
            self.confinement = CONTAINED_TASKS
        self._network = network
        self._limits_tasks = limits_tasks
        self._work = confine.CWD
        self._trees: dict[int, tuple[str, dict[bytes, bool]]] = {}

    def open_channel(self) -> int:
        """Open the channel."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # PID 1 ignores signals without a handler
        if self._network:
            system.loopback_up()
        return super().open_channel()

    def resource_limits(self, settings: confine.JobSettings) -> tuple[tuple[int, int], ...]:
        """Return the limits of each process of a command, with that of tasks if the runtime has none."""
        tasks = ((resource.RLIMIT_NPROC, settings.tasks),) if self._limits_tasks else ()
        return (*super().resource_limits(settings), *tasks)

    def make_folders(self) -> None:
        """Make the folder of the machine id. The engine has mounted all other folders."""
        os.makedirs(os.path.dirname(self.machine_id), exist_ok=True)

    def make_resolv_conf(self, text: str = "") -> None:
        """Do nothing, since the engine mounts /etc/resolv.conf."""

    def folder(self, name: str) -> str:
        """Return the path of the job folder *name*."""
        return self._work if name == "work" else super().folder(name)

    def make_job_folder(self, name: str, *, of_program: bool) -> None:
        """Make a job folder, unless it belongs to the program: the engine has mounted those."""
        if not of_program:
            os.makedirs(self.folder(name), exist_ok=True)

    def group(self) -> ContainerGroup:
        """Return the container's group."""
        return ContainerGroup()

    def adapt(self, opening: Open) -> Open:
        """Record the mount points of trees. Trees are unpacked directly at their mount points."""
        for mount in opening.mounts:
            if mount.tree is None:
                self._work = mount.at
                continue
            at, sub = mount.at, mount.sub
            if sub and not at.endswith(f"/{sub}"):
                raise JobError("mounts", 0, f"{at} does not match its path in the tree")
            base = at[: -len(sub) - 1] if sub else at
            self._trees.setdefault(mount.tree, (base, {}))[1][os.fsencode(sub)] = mount.write
        return opening

    def tree(self, number: int) -> Tree:
        """Return a tree on the engine's mounts."""
        base, mounts = self._trees[number]
        top = os.fsencode(base)
        mounted = {sub: write for sub, write in mounts.items() if not sub or os.path.ismount(top + b"/" + sub)}
        # For a root that is a single file, the engine mounts its folder.
        mounted.setdefault(b"", any(mounts.values()))
        return ContainerTree(base, mounted)

    def work_tree(self) -> Tree:
        """Return the tree of the working folder."""
        return ContainerTree(self.folder("work"), {b"": True})

    def mount(self, init: int, mounts: Sequence[tuple[str, str, bool]]) -> None:
        """Do nothing, since the engine has mounted the folders."""

    def reading(self) -> AbstractContextManager[None]:
        """Switch to the program's user: without CAP_DAC_OVERRIDE, root cannot read that user's files."""
        return as_program_user(confine.UID)
