"""Control groups of the host around a jail, where the host has them and we may use them.

Version 2: a group below our own, where we may make one and memory and pids are delegated. Version 1: as root, one
group in each hierarchy. Neither: the guest's fixed RAM size and rlimits bound the process; the result says so.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec
import msgspec.structs

from x07_sandbox.host.clocks import unix_ms
from x07_sandbox.host.processes import identify, sees_every_process

_ROOT: Final = Path("/sys/fs/cgroup")
_PARENT: Final = "x07-sandbox"
_MEMORY_LIMITS: Final = ("memory.max", "memory.limit_in_bytes")  # of versions 2 and 1
_JOB_NAME: Final = re.compile(r"\d+-\d+-\d+-[a-z0-9-]+")
_ABANDONED_S: Final = 60.0
_SWEPT_AT_ONCE: Final = 256


class HostGroups(msgspec.Struct, frozen=True, kw_only=True):
    """The groups of one job: their folders, and which limits they hold."""

    folders: tuple[Path, ...]
    holds: tuple[str, ...]

    def describe(self) -> str:
        """Which limits they hold, for the result."""
        return f"host control groups hold {' and '.join(self.holds)}" if self.holds else "no host control groups"

    def names(self) -> tuple[str, ...]:
        """Their folders, for the record."""
        return tuple(str(folder) for folder in self.folders)

    def add(self, pid: int) -> None:
        """Move a process into them. Raises OSError."""
        for folder in self.folders:
            (folder / "cgroup.procs").write_text(str(pid), encoding="ascii")

    def limit_memory(self, memory_bytes: int) -> None:
        """Set another limit on memory, where they hold one. Raises OSError where more than that is in use."""
        for path in (folder / name for folder in self.folders for name in _MEMORY_LIMITS):
            if path.exists():
                path.write_text(str(memory_bytes), encoding="ascii")

    def remove(self) -> bool:
        """Remove the groups of a job whose processes are gone; whether they are gone too."""
        left = [folder for folder in self.folders if not _removed(folder)]  # each is tried, also when one stays
        return not left


def remove_groups(names: Iterable[str]) -> bool:
    """Remove a job's groups by the names in its record; whether they are gone. One with a process in it stays."""
    places = [Path(name) for name in names]
    # A record may be damaged: only what could be a group of a job is touched, and rmdir takes nothing else.
    ours = [one for one in places if one.is_relative_to(_ROOT) and ".." not in one.parts and _is_jobs(one)]
    left = [folder for folder in ours if not _removed(folder)]
    return not left


def _is_jobs(folder: Path) -> bool:
    below_job = folder.name in {"program", "agent"}
    return _JOB_NAME.fullmatch(folder.parent.name if below_job else folder.name) is not None


def make_groups(name: str, *, memory_bytes: int, tasks: int) -> HostGroups:
    """Groups called *name* with these limits; no folders where the host gives us none."""
    remove_abandoned_groups()
    make = _version_2 if (_ROOT / "cgroup.controllers").exists() else _version_1
    return make(name, memory_bytes, tasks)


class ProgramGroups(HostGroups, frozen=True, kw_only=True):
    """Groups that an agent of ours puts a program into, and limits itself: its user may write to them.

    places: their folders, by the controller of version 1; "" for the one group of version 2.
    agent: the group of version 2 for the agent itself.
    """

    places: dict[str, Path]
    agent: Path | None = None

    def add(self, pid: int) -> None:
        """Move the agent to where it may move the program from. Raises OSError."""
        if self.agent is not None:
            (self.agent / "cgroup.procs").write_text(str(pid), encoding="ascii")


# What a user may be given of a group: which processes are in it, their end, and its limits.
_GIVEN: Final = {
    "memory": ("cgroup.procs", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"),
    "pids": ("cgroup.procs", "pids.max"),
    "cpuacct": ("cgroup.procs",),
}
_GIVEN_2: Final = ("cgroup.procs", "cgroup.kill", "memory.max", "memory.swap.max", "memory.oom.group", "pids.max")


def program_groups(name: str, *, uid: int) -> ProgramGroups:
    """Groups called *name*, still without limits, that *uid* may use; none where the host gives us none.

    Of version 1 only as root: an ordinary user cannot move processes between groups of others.
    """
    remove_abandoned_groups()
    if (_ROOT / "cgroup.controllers").exists():
        return _program_group_2(name, uid)
    places = {}
    for controller, files in _GIVEN.items():
        if os.geteuid() == 0 and (folder := _made_1(controller, name)):
            places[controller] = folder
            _give(folder, files, uid)
    return ProgramGroups(folders=tuple(places.values()), holds=tuple(places), places=places)


def _program_group_2(name: str, uid: int) -> ProgramGroups:
    """A group with two in it: a process is moved only by a user who may write to a group above both."""
    nothing = ProgramGroups(folders=(), holds=(), places={})
    if (parent := _parent_2()) is None:
        return nothing
    job = parent / name
    agent, program = job / "agent", job / "program"
    groups = ProgramGroups(folders=(program, agent, job), holds=(), places={"": program}, agent=agent)
    try:
        job.mkdir()
        offered = (job / "cgroup.controllers").read_text(encoding="ascii").split()
        held = [controller for controller in ("memory", "pids") if controller in offered]
        (job / "cgroup.subtree_control").write_text(" ".join(f"+{one}" for one in held), encoding="ascii")
        agent.mkdir()
        program.mkdir()
        for folder in (job, agent):
            _give(folder, ("cgroup.procs",), uid)
        _give(program, _GIVEN_2, uid)
    except OSError:
        groups.remove()
        return nothing
    # CPU time is counted in every group of version 2.
    return msgspec.structs.replace(groups, holds=(*held, "cpuacct"))


def _give(folder: Path, files: tuple[str, ...], uid: int) -> None:
    for file in files:
        if (folder / file).exists():  # not all are there on every kernel
            os.chown(folder / file, uid, uid)


def _parent_2() -> Path | None:
    """Where a group of version 2 can be made, with the controllers that it can have; None where we may not."""
    parent = _ROOT / _PARENT if os.geteuid() == 0 else _own_group()
    try:
        if os.geteuid() == 0:
            parent.mkdir(exist_ok=True)
        elif not os.access(parent / "cgroup.procs", os.W_OK):
            return None  # a process can only be moved below a group whose list of processes we may write
    except OSError:
        return None
    for folder in (*([_ROOT] if os.geteuid() == 0 else []), parent):
        for controller in ("memory", "pids"):
            with contextlib.suppress(OSError):  # it is not offered here
                (folder / "cgroup.subtree_control").write_text(f"+{controller}", encoding="ascii")
    return parent


def _version_2(name: str, memory_bytes: int, tasks: int) -> HostGroups:
    limits = {"memory.max": memory_bytes, "pids.max": tasks}
    with contextlib.suppress(OSError):
        if (parent := _parent_2()) is not None:
            folder = parent / name
            folder.mkdir()
            if _limited(folder, limits):
                return HostGroups(folders=(folder,), holds=("memory", "pids"))
    return HostGroups(folders=(), holds=())


def _own_group() -> Path:
    """The parent of our own version 2 group: a group with processes cannot have children with controllers."""
    for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
        if line.startswith("0::"):
            return (_ROOT / line[3:].lstrip("/")).parent
    return _ROOT


def _version_1(name: str, memory_bytes: int, tasks: int) -> HostGroups:
    held = {}
    for controller, file, value in (("memory", "memory.limit_in_bytes", memory_bytes), ("pids", "pids.max", tasks)):
        if (folder := _made_1(controller, name)) and _limited(folder, {file: value}):
            held[controller] = folder
    return HostGroups(folders=tuple(held.values()), holds=tuple(held))


def _made_1(controller: str, name: str) -> Path | None:
    """A new group of version 1; None where it is not ours to make, or the name is taken by another job."""
    folder = _ROOT / controller / _PARENT / name
    with contextlib.suppress(OSError):
        if (_ROOT / controller / "cgroup.procs").exists():
            folder.mkdir(parents=True)
            return folder
    return None


def _limited(folder: Path, limits: dict[str, int]) -> bool:
    """Write the limits of a group that was just made; where the kernel refuses one, the group goes again."""
    try:
        for file, value in limits.items():
            (folder / file).write_text(str(value), encoding="ascii")
    except OSError:
        with contextlib.suppress(OSError):
            folder.rmdir()
        return False
    return True


def _removed(folder: Path) -> bool:
    for _ in range(50):
        try:
            folder.rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            time.sleep(0.01)  # the kernel lets go of the last task a moment after it was reaped
        else:
            return True
    return False


def remove_abandoned_groups() -> None:
    """Remove groups of ours that killed runners left: empty ones only, and none that is about to be filled."""
    for parent in (_ROOT / _PARENT, *(_ROOT / controller / _PARENT for controller in _GIVEN)):
        with contextlib.suppress(OSError):
            for folder in list(parent.iterdir())[:_SWEPT_AT_ONCE]:
                if folder.is_dir() and _abandoned(folder):
                    for one in (folder / "program", folder / "agent", folder):
                        with contextlib.suppress(OSError):  # the kernel refuses one that holds a process
                            one.rmdir()


def _abandoned(folder: Path) -> bool:
    """Whether the runner that made a group is dead, by the job's name (jobs/record), or has had a minute to fill it."""
    runner = folder.name.split("-")[1:2]
    if sees_every_process() and runner and runner[0].isdigit() and identify(int(runner[0])) is None:
        return True
    return unix_ms() / 1000 - folder.stat().st_mtime > _ABANDONED_S
