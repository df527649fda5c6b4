"""The agent as a process on a shared kernel: inside bubblewrap (`Confined`), or unconfined (`Unconfined`).

In its user namespace, which bubblewrap made, `Confined` is uid 0; to the kernel it is the calling user. Its init builds
what the program sees in the same way as in a VM. The program then enters a nested user namespace. To the kernel it is
still the same user, but it has no rights over mounts or over processes outside that namespace.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from x07_sandbox import kernel
from x07_sandbox.channel.messages import Confine
from x07_sandbox.guest import confine, system
from x07_sandbox.guest.audit import NoAudit
from x07_sandbox.guest.cgroup import NoGroup, host_group
from x07_sandbox.guest.errors import JobError
from x07_sandbox.guest.platform import Platform
from x07_sandbox.guest.system import children_of, write_file

if TYPE_CHECKING:
    from x07_sandbox.channel.messages import Exec, Open, Seed
    from x07_sandbox.guest.relay_process import RelayProcess

GROUP: Final = "/run/x07/cgroup"  # the program's control group, if the host has made one
# The first Landlock version (landlock(7)) that allows moving files between folders.
_RULES_ABI: Final = 2
_CORE_NONE: Final = 1  # core(5): this limit, not 0, also suppresses dumps that are piped to a program


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
CONFINED: Final = confine.Confinement(
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
        from x07_sandbox.guest.relay_process import on_shared_channel

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
UNCONFINED: Final = confine.Confinement(
    world=(FREE_INIT,),
    rights=(confine.Step("end with init", "", _end_with_parent), confine.FRESH_SIGNALS),
    job=(confine.Step("resource limits", "", limits_of_child, confine.RESOURCES),),
)
# The guest paths that the host uses, and the folders below `scratch` that replace them.
_REPLACEMENTS: Final = (("/x07/in", "in"), ("/x07/out", "out"), (confine.CWD, "work"))


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
        free = Confine(threads=True, spawn=True, execute=True, programs=None, prefixes=[], alone=False)
        return opening._replace(mounts=[], confine=free)

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
