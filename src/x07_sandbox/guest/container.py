"""The agent as the first process of a container, which an engine has made: root with four capabilities, no more.

It cannot mount anything: whatever has a size or an owner of its own was mounted by the engine. The program is another
user of the same namespaces, so it reaches neither agent nor channel; what it may not write belongs to root.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final

from x07_sandbox.channel.trees import Entry, Kind
from x07_sandbox.guest import confine, system
from x07_sandbox.guest.cgroup import GivenGroup, GivenGroups, NoGroup, counter
from x07_sandbox.guest.errors import JobError
from x07_sandbox.guest.process import FREE_INIT, RULES, SCOPES, OnSharedKernel, limit
from x07_sandbox.guest.relay_process import RelayProcess
from x07_sandbox.guest.system import write_file
from x07_sandbox.guest.trees import Tree, as_program_user

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NET_SOCKET: Final = "/run/x07-net/relay"
_SCRATCH: Final = "/x07"
_CGROUP: Final = "/sys/fs/cgroup"
_READ_AND_ENTER: Final = 0o500
_KILLS: Final = 1000  # a zombie counts until init has waited for it


def _first_to_die(_world: confine.World) -> None:
    write_file("/proc/self/oom_score_adj", "1000")  # the agent has 0: it must live to tell


@contextlib.contextmanager
def _program_user() -> Iterator[None]:
    """Be the program's user, in all that permissions are decided by, and root again afterwards (setresuid(2))."""
    os.setresgid(confine.UID, confine.UID, 0)
    os.setresuid(confine.UID, confine.UID, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)


def _resource_limits(settings: confine.JobSettings) -> None:
    with _program_user():  # for another user's process the kernel wants CAP_SYS_RESOURCE (prlimit(2))
        for pid in system.children_of(os.getpid())[:1]:
            limit(pid, confine.resource_limits(settings))


_OF_MACHINE: Final = {step.name: step for step in confine.MACHINE.rights}
CONTAINED: Final = confine.Confinement(
    world=(FREE_INIT, RULES),
    rights=(
        confine.Step("first to die", "", _first_to_die),
        *(_OF_MACHINE[name] for name in ("no capabilities", "own user", "no new privileges")),
        confine.FRESH_SIGNALS,
        SCOPES,
        _OF_MACHINE["system calls"],
    ),
    job=(
        *(step for step in confine.VIEW if step.name == "programs"),
        confine.Step("resource limits", "CAP_SETUID, CAP_SETGID", _resource_limits, confine.RESOURCES),
    ),
)


class ContainerGroup(NoGroup):
    """The container's own control group, read only: the engine has set its limits, and the agent is in it too."""

    KILLS = True

    def __init__(self) -> None:
        super().__init__(_CGROUP)
        unified = os.path.exists(f"{_CGROUP}/cgroup.controllers")
        self._counters: dict[str, tuple[str, ...]] = (GivenGroup if unified else GivenGroups).COUNTERS
        self._cpu = ("cpu.stat", "usage_usec") if unified else ("cpuacct/cpuacct.usage",)
        self._unit = 1 if unified else 1000

    def count(self, what: str) -> int:
        """As NoGroup has it."""
        name, *keys = self._counters[what]
        return counter(f"{_CGROUP}/{name}", keys)

    def cpu_us(self, init: int) -> int:  # noqa: ARG002 - of use to NoGroup
        """CPU time of the container so far, in microseconds."""
        name, *keys = self._cpu
        return counter(f"{_CGROUP}/{name}", keys) // self._unit

    def kill(self, init: int) -> None:  # noqa: ARG002 - as above
        """End every process of the program's user: this one, the first of its namespace, hears no signal of theirs."""
        with _program_user(), contextlib.suppress(ProcessLookupError):
            for _ in range(_KILLS):
                os.kill(-1, signal.SIGKILL)  # kill(2): all that this user may signal, until there is none
                time.sleep(0.001)


class ContainerTree(Tree):
    """A tree below the engine's own mounts: what the program may write is its own, all else is root's.

    places: folders below *folder* that are mounts, and whether the program may write there.
    """

    def __init__(self, folder: str, places: dict[bytes, bool]) -> None:
        super().__init__(folder, None)
        self._places = places

    def _owner(self, name: bytes) -> int | None:
        around = (place for place in self._places if not place or name == place or name.startswith(place + b"/"))
        return confine.UID if self._places.get(max(around, key=len, default=b""), False) else None

    def _make(self, entry: Entry) -> None:
        owner = self._owner(entry.name)
        if owner is None:  # the program reads it as a stranger
            seen = entry.mode & _READ_AND_ENTER
            entry = entry._replace(mode=entry.mode | seen >> 3 | seen >> 6)
        if entry.name in self._places and entry.kind is Kind.FOLDER:  # it is the engine's, with a mode of its own
            self.folders[entry.name] = os.stat(entry.name or b".", dir_fd=self._top).st_mode & 0o7777
            return
        with as_program_user(owner):
            super()._make(entry)

    def _close_file(self) -> None:
        assert self._entry is not None  # noqa: S101 - for the type checker
        with as_program_user(self._owner(self._entry.name)):
            super()._close_file()

    def _finish_folder(self, folder: bytes, mode: int, mtime_ns: int | None) -> None:
        with as_program_user(self._owner(folder)):
            super()._finish_folder(folder, mode, mtime_ns)


def _below(base: str, sub: bytes) -> bytes:
    return os.fsencode(base) + b"/" + sub


class Contained(OnSharedKernel):
    """In a container. network: whether the engine gave it the gate's socket."""

    confinement = CONTAINED
    program_uid = confine.UID
    scratch = memory = _SCRATCH
    machine_id = confine.MACHINE_ID
    channel_out_fd = 1
    filtered = True
    namespaces = False

    def __init__(self, *, network: bool) -> None:
        super().__init__(0)
        self._network = network
        self._work = confine.CWD
        self._trees: dict[int, tuple[str, dict[bytes, bool]]] = {}

    def open_channel(self) -> int:
        """Connect to the gate, before anything hostile is here."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the kernel keeps from its first process what has no handler
        if self._network:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.connect(NET_SOCKET)
            self._net_fd = sock.detach()
            system.loopback_up()
        return super().open_channel()

    def make_folders(self) -> None:
        """Make the folder of the machine id: all others were mounted."""
        os.makedirs(os.path.dirname(self.machine_id), exist_ok=True)

    def make_resolv_conf(self) -> None:
        """Nothing: the engine has put it there."""

    def folder(self, name: str) -> str:
        """As Platform has it."""
        return self._work if name == "work" else super().folder(name)

    def make_place_folder(self, name: str, *, of_program: bool) -> None:
        """Make what was not mounted."""
        if not of_program:
            os.makedirs(self.folder(name), exist_ok=True)

    def group(self) -> ContainerGroup:
        """The container's."""
        return ContainerGroup()

    def adapt(self, body: dict[str, Any]) -> dict[str, Any]:
        """See where trees go: each is made where the program finds it."""
        for mount in body["mounts"]:
            if mount["tree"] is None:
                self._work = mount["at"]
                continue
            at, sub = mount["at"], mount["sub"]
            if sub and not at.endswith(f"/{sub}"):
                raise JobError("mounts", 0, f"{at} is not where its tree has it")
            base = at[: -len(sub) - 1] if sub else at
            self._trees.setdefault(mount["tree"], (base, {}))[1][os.fsencode(sub)] = mount["write"]
        return body

    def tree(self, number: int) -> Tree:
        """One below the engine's mounts."""
        base, places = self._trees[number]
        mounted = {sub: write for sub, write in places.items() if not sub or os.path.ismount(_below(base, sub))}
        # Where a root is one file, the folder around it was mounted for it alone.
        mounted.setdefault(b"", any(places.values()))
        return ContainerTree(base, mounted)

    def work_tree(self) -> Tree:
        """As Platform has it."""
        return ContainerTree(self.folder("work"), {b"": True})

    def mount(self, init: int, mounts: Sequence[tuple[str, str, bool]]) -> None:
        """Nothing: they are there."""

    def reading(self) -> AbstractContextManager[None]:
        """As the program's user, whose files root may not read here."""
        return as_program_user(confine.UID)

    def relay(self, netns_fd: int) -> RelayProcess:
        """One in this very network namespace."""
        if self._net_fd < 0:
            raise JobError("relay", 0, "this container has no way to the gate")
        os.set_blocking(self._net_fd, False)
        return RelayProcess(netns_fd, lambda: self._net_fd, (self._net_fd,), hold=False)
