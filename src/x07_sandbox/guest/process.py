"""The agent as a process on a shared kernel: inside bubblewrap, in a container, or unconfined.

In its user namespace, which bubblewrap made, `Confined` is uid 0; to the kernel it is the calling user. Its init builds
what the program sees in the same way as in a VM. The program then enters a nested user namespace. To the kernel it is
still the same user, but it has no rights over mounts or over processes outside that namespace.

`Contained` is PID 1 of a container made by an engine: root with four capabilities. It cannot mount anything, so the
engine mounts every folder. The program is another user in the same namespaces, and reaches neither agent nor channel.
Folders that the program may not write belong to root.
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

from x07_sandbox import kernel
from x07_sandbox.channel.messages import CWD, FREE, IN, OUT
from x07_sandbox.channel.trees import Entry, Kind
from x07_sandbox.guest import confine, system
from x07_sandbox.guest.audit import NoAudit
from x07_sandbox.guest.cgroup import HostGroup, HostGroupsV1, NoGroup, counter, host_group
from x07_sandbox.guest.platform import Platform
from x07_sandbox.guest.system import JobError, children_of, write_file
from x07_sandbox.guest.trees import Tree, as_program_user

if TYPE_CHECKING:
    from x07_sandbox.channel.messages import Exec, Open, Seed
    from x07_sandbox.guest.relay import RelayProcess


GROUP: Final = "/run/x07/cgroup"  # the program's control group, if the host has made one
# The first Landlock version (landlock(7)) that allows moving files between folders.
_RULES_ABI: Final = 2
_CORE_NONE: Final = 1  # core(5): this limit, not 0, also suppresses dumps that are piped to a program

_CGROUP: Final = "/sys/fs/cgroup"
_READ_AND_ENTER: Final = 0o500
_KILLS: Final = 1000  # attempts: a zombie counts as a process until init reaps it


def _bind_device(name: str, path: str) -> None:
    with open(path, "x", encoding="ascii"):
        pass
    system.mount(f"/dev/{name}", path, "", system.MS_BIND)


def _devices(_world: confine.World) -> None:
    confine.devices(_bind_device)


def _rules(world: confine.World) -> None:
    # On an older kernel, a job that needs the rules fails, since their descriptor is missing.
    if kernel.landlock_version() >= _RULES_ABI:
        confine.rules(world)


def _own_user(world: confine.World) -> None:
    """Enter the programs' user namespace, which has a single user, without capabilities. The first process makes it."""
    if world.user_fd >= 0:
        os.setns(world.user_fd, os.CLONE_NEWUSER)
    else:
        os.unshare(os.CLONE_NEWUSER)
        write_file("/proc/self/setgroups", "deny")
        for name in ("uid_map", "gid_map"):
            write_file(f"/proc/self/{name}", f"{confine.UID} 0 1")
    confine.no_capabilities(world)
    kernel.drop_capabilities()


def _limit(pid: int, limits: tuple[tuple[int, int], ...]) -> None:
    """Set resource limits of the process *pid*, each to at most its present hard limit."""
    for which, value in _possible(limits, pid):
        resource.prlimit(pid, which, (value, value))


def _possible(limits: tuple[tuple[int, int], ...], pid: int = 0) -> Iterator[tuple[int, int]]:
    """Yield *limits* that the kernel has, each lowered to the present hard limit of a process (0: this one)."""
    for which, wanted in limits:
        try:
            resource.setrlimit(which, resource.getrlimit(which))
        except (PermissionError, ValueError):  # gVisor has neither message queues nor priorities
            continue
        value = max(wanted, _CORE_NONE) if which == resource.RLIMIT_CORE else wanted
        _, hard = resource.prlimit(pid, which)
        yield which, value if hard == resource.RLIM_INFINITY else min(value, hard)


def _resource_limits(settings: confine.JobSettings) -> None:
    # Tasks are counted per user namespace (Linux 5.14), and the program is the only user of its own.
    _limit(confine.PROGRAM_PID, (*confine.resource_limits(settings), (resource.RLIMIT_NPROC, settings.tasks)))


RULES: Final = confine.Step[confine.World]("rules about programs", "Landlock 2, where the kernel has it", _rules)
_INSTEAD: Final[dict[str, confine.Step[confine.World]]] = {
    step.name: step
    for step in (
        confine.Step("devices", "CAP_SYS_ADMIN", _devices),
        confine.Step("own user", "CAP_SYS_ADMIN, CAP_SETFCAP, one more user namespace", _own_user),
        RULES,
    )
}
_OMITTED: Final = {confine.BOUNDING_SET, confine.NO_CAPABILITIES}  # _own_user also drops capabilities
# The steps of a VM with replacements.
CONFINED: Final = confine.Steps(
    world=tuple(_INSTEAD.get(step.name, step) for step in confine.MACHINE.world if step.name not in _OMITTED),
    rights=tuple(_INSTEAD.get(step.name, step) for step in confine.MACHINE.rights if step.name not in _OMITTED),
    job=(*confine.VIEW, confine.Step("resource limits", "", _resource_limits, (*confine.RESOURCES, "tasks"))),
)


class OnSharedKernel(Platform):
    """The common part of the platforms that share the host's kernel."""

    program_uid: int | None = None

    def __init__(self, channel_fd: int) -> None:
        self._channel_fd = channel_fd

    def open_channel(self) -> int:
        """Make the inherited channel close-on-exec, and return it."""
        os.set_inheritable(self._channel_fd, False)  # noqa: FBT003
        return self._channel_fd

    def relay(self, netns_fd: int) -> RelayProcess:
        """Start a relay that shares the channel."""
        from x07_sandbox.guest.relay import on_shared_channel

        return on_shared_channel(netns_fd)

    def audit(self) -> NoAudit:
        """Return an audit that reports nothing, since the audit of the host's kernel cannot be used here."""
        return NoAudit()

    def resource_limits(self, settings: confine.JobSettings) -> tuple[tuple[int, int], ...]:
        """Return the limits of each process of a command, at most those of this process."""
        return tuple(_possible(confine.resource_limits(settings)))

    def seed(self, seed: Seed) -> None:
        """Do nothing, since clock and entropy are the host's."""

    def end(self) -> None:
        """End this process."""
        os._exit(0)


class Confined(OnSharedKernel):
    """The agent inside bubblewrap."""

    confinement = CONFINED
    scratch = confine.SCRATCH
    memory = confine.MEMORY
    machine_id = confine.MACHINE_ID
    filtered = True
    namespaces = True

    def open_channel(self) -> int:
        """Open the channel. Allow only one more user namespace, the program's, so that the program cannot make any."""
        write_file("/proc/sys/user/max_user_namespaces", "1")
        return super().open_channel()

    def resource_limits(self, settings: confine.JobSettings) -> tuple[tuple[int, int], ...]:
        """Return the limits of each process of a command, with that of tasks."""
        return (*super().resource_limits(settings), (resource.RLIMIT_NPROC, settings.tasks))

    def make_folders(self) -> None:
        """Mount a tmpfs for small files. The scratch folder exists already."""
        confine.mount_memory()

    def group(self) -> NoGroup:
        """Return the group that the host made."""
        return host_group(GROUP)


def _own_init(world: confine.World) -> None:
    """Become a subreaper, so that the program's orphans are children of init, and end when the agent ends."""
    kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
    _end_with_parent(world)


def _end_with_parent(_world: confine.World) -> None:
    kernel.prctl(kernel.PR_SET_PDEATHSIG, 9)


def limits_of_child(settings: confine.JobSettings, *, tasks: bool = False) -> None:
    """Set the resource limits of the program, which is the first child of this process. tasks: also that of tasks."""
    more = ((resource.RLIMIT_NPROC, settings.tasks),) if tasks else ()
    for pid in children_of(os.getpid())[:1]:
        _limit(pid, (*confine.resource_limits(settings), *more))


FREE_INIT: Final = confine.Step[confine.World]("reaper", "", _own_init)
UNCONFINED: Final = confine.Steps(
    world=(FREE_INIT,),
    rights=(confine.Step("end with init", "", _end_with_parent), confine.FRESH_SIGNALS),
    job=(confine.Step("resource limits", "", limits_of_child, confine.RESOURCES),),
)
# The guest paths that the host uses, and the folders below `scratch` that replace them.
_REPLACEMENTS: Final = ((IN, "in"), (OUT, "out"), (CWD, "work"))


class Unconfined(OnSharedKernel):
    """The program as an ordinary process of the user, without any confinement."""

    confinement = UNCONFINED
    filtered = False
    namespaces = False

    def __init__(self, channel_fd: int, folder: str) -> None:
        super().__init__(channel_fd)
        self.scratch = self.memory = folder
        self.machine_id = f"{folder}/machine-id"
        self._replacements: tuple[tuple[str, str], ...] = _REPLACEMENTS

    def make_folders(self) -> None:
        """Do nothing, since the host has made the only folder."""

    def group(self) -> NoGroup:
        """Return a group that enforces nothing."""
        return NoGroup()

    def adapt(self, opening: Open) -> Open:
        """Remember the private working folder, and drop mounts and restrictions."""
        # A mount without a tree is the working folder; others would need real mounts.
        if any(mount.tree is not None for mount in opening.mounts):
            raise JobError("mounts", 0, "host folders cannot be mounted without confinement")
        self._replacements = (*((mount.at, "work") for mount in opening.mounts), *_REPLACEMENTS)
        return opening._replace(mounts=[], confine=FREE)

    def adapt_command(self, order: Exec) -> Exec:
        """Replace guest paths by paths in the private folder."""
        return order._replace(
            argv=[self._replace(word) for word in order.argv],
            env={name: self._replace(value) for name, value in order.env.items()},
            cwd=self._replace(order.cwd),
        )

    def _replace(self, word: str) -> str:
        for path, name in self._replacements:
            if word == path or word.startswith(f"{path}/"):
                return f"{self.scratch}/{name}{word[len(path) :]}"
        return word


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


def _limits_in_container(settings: confine.JobSettings, *, tasks: bool = False) -> None:
    with _program_user():  # another user's process would need CAP_SYS_RESOURCE (prlimit(2))
        limits_of_child(settings, tasks=tasks)


_MACHINE_STEPS: Final = {step.name: step for step in confine.MACHINE.rights}
CONTAINED: Final = confine.Steps(
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
        confine.Step("resource limits", "CAP_SETUID, CAP_SETGID", _limits_in_container, confine.RESOURCES),
    ),
)
# For runtimes that cannot limit tasks.
CONTAINED_TASKS: Final = confine.Steps(
    world=CONTAINED.world,
    rights=CONTAINED.rights,
    job=(
        *CONTAINED.job[:-1],
        confine.Step(
            "resource limits",
            "CAP_SETUID, CAP_SETGID",
            functools.partial(_limits_in_container, tasks=True),
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
        assert self._entry is not None  # a file is open
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
        self._work = CWD
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
