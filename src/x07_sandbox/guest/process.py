"""The agent as a process of somebody else's machine: below bubblewrap (`Confined`), or unconfined (`Unconfined`).

`Confined` is uid 0 of a user namespace that bubblewrap has made; to the kernel, the user who started it. Its init
builds the program's view from there, as in a machine. The program then enters a user namespace below that one: still
the same user to the kernel, but without rights over processes outside its namespace, and over what is mounted.

Both find their channel, an inherited descriptor, on the command line, and end when that ends.
"""

from __future__ import annotations

import os
import resource
from typing import TYPE_CHECKING, Any, Final

from x07_sandbox.guest import confine, system
from x07_sandbox.guest.audit import NoAudit
from x07_sandbox.guest.cgroup import NoGroup, given_group
from x07_sandbox.guest.errors import JobError
from x07_sandbox.guest.platform import Platform
from x07_sandbox.guest.system import children_of, write_file

if TYPE_CHECKING:
    from x07_sandbox.guest.relay_process import RelayProcess

GROUP: Final = "/run/x07/cgroup"  # where the host puts control groups for the program, where it has any
# The first versions of Landlock (landlock(7)) that let files be moved from folder to folder, and that have scopes.
_RULES_ABI: Final = 2
_SCOPES_ABI: Final = 6
_CORE_NONE: Final = 1  # a core dump that goes to a program of the host is suppressed by this limit only (core(5))


def _bind_device(name: str, path: str) -> None:
    with open(path, "x", encoding="ascii"):
        pass
    system.mount(f"/dev/{name}", path, "", system.MS_BIND)


def _devices(_world: confine.World) -> None:
    confine.devices(_bind_device)


def _rules(world: confine.World) -> None:
    # Without them a job that needs these rules fails: there is no descriptor of them.
    if system.landlock_version() >= _RULES_ABI:
        confine.rules(world)


def _own_user(_world: confine.World) -> None:
    """A user namespace below the agent's, in which there is one user, without capabilities."""
    os.unshare(os.CLONE_NEWUSER)
    write_file("/proc/self/setgroups", "deny")
    for name in ("uid_map", "gid_map"):
        write_file(f"/proc/self/{name}", f"{confine.UID} 0 1")
    confine.no_capabilities(_world)
    system.drop_capabilities()


def _scopes(world: confine.World) -> None:
    if system.landlock_version() >= _SCOPES_ABI:
        confine.scopes(world)


def limit(pid: int, limits: tuple[tuple[int, int], ...]) -> None:
    """Set what the user who started us may set: a limit of theirs that is lower stays."""
    for which, wanted in limits:
        value = max(wanted, _CORE_NONE) if which == resource.RLIMIT_CORE else wanted
        _, hard = resource.prlimit(pid, which)
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.prlimit(pid, which, (value, value))


def _resource_limits(settings: confine.JobSettings) -> None:
    # Tasks are counted in the program's own user namespace (Linux 5.14), of which it is the only user.
    limit(confine.PROGRAM_PID, (*confine.resource_limits(settings), (resource.RLIMIT_NPROC, settings.tasks)))


RULES: Final = confine.Step[confine.World]("rules about programs", "Landlock 2, where the kernel has it", _rules)
SCOPES: Final = confine.Step[confine.World]("scopes", "Landlock 6, where the kernel has it", _scopes)
_INSTEAD: Final[dict[str, confine.Step[confine.World]]] = {
    step.name: step
    for step in (
        confine.Step("devices", "CAP_SYS_ADMIN", _devices),
        confine.Step("own user", "CAP_SYS_ADMIN, CAP_SETFCAP, one more user namespace", _own_user),
        RULES,
        SCOPES,
    )
}
# The steps of a machine, but for these; _own_user gives up capabilities too.
CONFINED: Final = confine.Confinement(
    world=tuple(_INSTEAD.get(step.name, step) for step in confine.MACHINE.world),
    rights=tuple(_INSTEAD.get(step.name, step) for step in confine.MACHINE.rights if step.name != "no capabilities"),
    job=(*confine.VIEW, confine.Step("resource limits", "", _resource_limits, (*confine.RESOURCES, "tasks"))),
)


class OnSharedKernel(Platform):
    """What those have in common that run on a kernel of somebody else's."""

    program_uid: int | None = None

    def __init__(self, channel_fd: int, net_fd: int = -1) -> None:
        self._channel_fd = channel_fd
        self._net_fd = net_fd

    def open_channel(self) -> int:
        """Keep the channel from what is executed."""
        for fd in (self._channel_fd, self._net_fd):
            if fd >= 0:
                os.set_inheritable(fd, False)  # noqa: FBT003 - it takes no names
        return self._channel_fd

    def relay(self, netns_fd: int) -> RelayProcess:
        """One that has an inherited stream. First packets are not held: the host's kernel may not be able to."""
        from x07_sandbox.guest.relay_process import RelayProcess

        if self._net_fd < 0:
            raise JobError("relay", 0, "this backend carries no connections")
        os.set_blocking(self._net_fd, False)
        return RelayProcess(netns_fd, lambda: self._net_fd, (self._net_fd,), hold=False)

    def audit(self) -> NoAudit:
        """None: the kernel's audit is the host's."""
        return NoAudit()

    def seed(self, body: dict[str, Any]) -> None:
        """Nothing: clock and entropy are the host's."""

    def end(self) -> None:
        """End this process."""
        os._exit(0)


class Confined(OnSharedKernel):
    """Below bubblewrap."""

    confinement = CONFINED
    scratch = confine.SCRATCH
    memory = confine.MEMORY
    machine_id = confine.MACHINE_ID
    filtered = True
    namespaces = True

    def open_channel(self) -> int:
        """Allow one user namespace more, which is the program's: nobody can make another then."""
        write_file("/proc/sys/user/max_user_namespaces", "1")
        return super().open_channel()

    def make_folders(self) -> None:
        """Mount a folder in memory; the scratch folder is there."""
        confine.mount_memory()

    def group(self) -> NoGroup:
        """The group that the host has made."""
        return given_group(GROUP)


def _own_init(world: confine.World) -> None:
    """Orphans of the program become init's children, and init dies with the agent."""
    system.prctl(system.PR_SET_CHILD_SUBREAPER, 1)
    _end_with_parent(world)


def _end_with_parent(_world: confine.World) -> None:
    system.prctl(system.PR_SET_PDEATHSIG, 9)


def _limits_of_child(settings: confine.JobSettings) -> None:
    for pid in children_of(os.getpid())[:1]:
        limit(pid, confine.resource_limits(settings))


FREE_INIT: Final = confine.Step[confine.World]("reaper", "", _own_init)
UNCONFINED: Final = confine.Confinement(
    world=(FREE_INIT,),
    rights=(confine.Step("end with init", "", _end_with_parent), confine.FRESH_SIGNALS),
    job=(confine.Step("resource limits", "", _limits_of_child, confine.RESOURCES),),
)
# Paths that the host names, and the folders below `scratch` that stand for them.
_STANDS: Final = (("/x07/in", "in"), ("/x07/out", "out"), (confine.CWD, "work"))


class Unconfined(OnSharedKernel):
    """The program as an ordinary process of the user: nothing keeps it from anything."""

    confinement = UNCONFINED
    filtered = False
    namespaces = False

    def __init__(self, channel_fd: int, folder: str) -> None:
        super().__init__(channel_fd)
        self.scratch = self.memory = folder
        self.machine_id = f"{folder}/machine-id"
        self._stands: tuple[tuple[str, str], ...] = _STANDS

    def make_folders(self) -> None:
        """Nothing: there is one folder, and the host has made it."""

    def group(self) -> NoGroup:
        """None."""
        return NoGroup()

    def adapt(self, body: dict[str, Any]) -> dict[str, Any]:
        """With the private folder instead of the paths that a confined program finds its files at."""
        # The folder of a project is one of our own; others would have to be mounted.
        if any(mount["tree"] is not None for mount in body["mounts"]):
            raise JobError("mounts", 0, "folders of the host cannot be brought in without confinement")
        self._stands = (*((mount["at"], "work") for mount in body["mounts"]), *_STANDS)
        allowed = dict.fromkeys(("threads", "spawn", "execute"), True)
        return {
            **body,
            "argv": [self._own(word) for word in body["argv"]],
            "env": {name: self._own(value) for name, value in body["env"].items()},
            "cwd": self._own(body["cwd"]),
            "mounts": [],
            "confine": {**allowed, "programs": None, "prefixes": [], "alone": False},
        }

    def _own(self, word: str) -> str:
        for path, name in self._stands:
            if word == path or word.startswith(f"{path}/"):
                return f"{self.scratch}/{name}{word[len(path) :]}"
        return word
