"""What each job gets on the host: a uid of its own, if root starts the job, and control groups.

bubblewrap keeps the uid's lock open until the last process of the jail has ended. Only then is the uid free again.

Control groups exist if the host has them and this user may create them. With cgroup version 2, the job's group is a
child of this process's parent group, if memory and pids are delegated to this user. With version 1, root creates a
group in each hierarchy. Otherwise only the guest's fixed RAM size and rlimits limit the process, and the result says
so.
"""

import contextlib
import fcntl
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import msgspec
import msgspec.structs

from x07_sandbox.errors import HostError
from x07_sandbox.host import start_thread
from x07_sandbox.host.linux import sees_every_process
from x07_sandbox.host.paths import private_dir
from x07_sandbox.host.processes import close_on_fork, identify
from x07_sandbox.host.waiting import unix_ms

COUNT: Final = 4096
_UIDS: Final = Path("/run/x07-sandbox/uids")
_CANDIDATES: Final = (0x70000000, 0x60000000, 1_000_000_000, 500_000_000, 60_100)
_TRIES: Final = 64
_ROOT: Final = Path("/sys/fs/cgroup")
_PARENT: Final = "x07-sandbox"
# For each controller, its files in versions 2 and 1. The first is the limit; the agent writes to all of them.
_FILES: Final = {
    "memory": (
        ("memory.max", "memory.swap.max", "memory.oom.group"),
        ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"),
    ),
    "pids": (("pids.max",), ("pids.max",)),
    "cpuacct": ((), ()),  # version 2 counts CPU time in every group
}
_JOB_NAME: Final = re.compile(r"\d+-\d+-\d+-[a-z0-9-]+")
_OF_LATER_MACHINE: Final = 6  # words in the name of a job: run id, phase, number and process (sessions/job)
_ABANDONED_S: Final = 60.0
_SWEPT_AT_ONCE: Final = 256


# uids


def _ranges(path: str, first: int, count: int) -> list[tuple[int, int]]:
    """Return the ranges (first, count) in a file of colon-separated fields. first, count: indexes of the fields."""
    found = []
    with contextlib.suppress(FileNotFoundError), Path(path).open(encoding="utf-8", errors="replace") as file:
        for line in file:
            fields = line.strip().split(":")
            with contextlib.suppress(IndexError, ValueError):
                found.append((int(fields[first]), int(fields[count]) if count else 1))
    return found


def free_range() -> int:
    """Return the first of COUNT mapped uids that are not in passwd, group, subuid or subgid. Raises HostError."""
    lines = Path("/proc/self/uid_map").read_text(encoding="ascii").splitlines()
    mapped = [tuple(int(word) for word in line.split()) for line in lines]
    taken = [*_ranges("/etc/passwd", 2, 0), *_ranges("/etc/group", 2, 0)]
    taken += [*_ranges("/etc/subuid", 1, 2), *_ranges("/etc/subgid", 1, 2)]
    for first in _CANDIDATES:
        inside = any(start <= first and first + COUNT <= start + size for start, _, size in mapped)
        clash = any(first < start + size and start < first + COUNT for start, size in taken)
        if inside and not clash:
            return first
    fix = "Run as an ordinary user, or map more uids into this container"
    raise HostError("cannot assign a uid to the job", "no free range of 4096 uids is mapped here", fix)


@contextlib.contextmanager
def lease_uid() -> Iterator[tuple[int, int]]:
    """Yield a uid that no other job on this machine uses, and its lock's descriptor. Raises HostError."""
    first = free_range()
    for _ in range(_TRIES):
        uid = first + int.from_bytes(os.urandom(4), "big") % COUNT
        fd = close_on_fork.add(_lock_file(str(uid)))
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            close_on_fork.close(fd)
            continue
        try:
            yield uid, fd
        finally:
            close_on_fork.close(fd)
        return
    raise HostError(
        "cannot assign a uid to the job", f"{_TRIES} random uids were all in use", "Wait for other jobs to end"
    )


def _lock_file(name: str) -> int:
    """Open the lock file of one uid. Its path is fixed, so that all jobs of the machine share it."""
    try:
        private_dir(_UIDS.parent)
        return os.open(private_dir(_UIDS) / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except (HostError, OSError) as exc:
        why = f"{exc.what} ({exc.why})" if isinstance(exc, HostError) else f"{exc.strerror} ({_UIDS})"
        fix = "Make /run writable for root (in a container: a tmpfs), or run as an ordinary user"
        raise HostError("cannot assign a uid to the job", why, fix) from exc


# control groups


class HostGroups(msgspec.Struct, frozen=True, kw_only=True):
    """The control groups of one job. holds: the names of the limits that the groups enforce."""

    folders: tuple[Path, ...]
    holds: tuple[str, ...]

    def describe(self) -> str:
        """Return a description of the groups for the run's result."""
        return f"host control groups hold {' and '.join(self.holds)}" if self.holds else "no host control groups"

    def names(self) -> tuple[str, ...]:
        """Return the groups' folders, for the job's record."""
        return tuple(str(folder) for folder in self.folders)

    def add(self, pid: int) -> None:
        """Move a process into the groups. Raises OSError if the kernel refuses."""
        for folder in self.folders:
            (folder / "cgroup.procs").write_text(str(pid), encoding="ascii")

    def limit_memory(self, memory_bytes: int) -> None:
        """Change the memory limit, if there is one. Raises OSError if more memory is in use."""
        for path in (folder / files[0] for folder in self.folders for files in _FILES["memory"]):
            if path.exists():
                path.write_text(str(memory_bytes), encoding="ascii")

    def remove(self) -> bool:
        """Remove the groups of processes that have ended, and return whether the groups are gone."""
        return _all_removed(self.folders)


def remove_groups(names: Iterable[str]) -> bool:
    """Remove a job's groups by the paths in its record, and return whether they are gone. Groups in use stay."""
    places = [Path(name) for name in names]
    # The record may be damaged, so only what can be a job's group is removed, and only by rmdir.
    return _all_removed(one for one in places if one.is_relative_to(_ROOT) and ".." not in one.parts and _is_jobs(one))


def _is_jobs(folder: Path) -> bool:
    below_job = folder.name in {"program", "agent"}
    return _JOB_NAME.fullmatch(folder.parent.name if below_job else folder.name) is not None


def make_groups(name: str, *, memory_bytes: int, tasks: int) -> HostGroups:
    """Create groups called *name* with these limits. If the host provides none, the result has no folders.

    The move of a process into them is quick if it follows within about 30 ms.
    """
    remove_abandoned_groups()
    groups = _made(name, memory_bytes, tasks)
    if groups.folders:
        # Before it moves a process, the kernel waits for an RCU grace period (7 to 24 ms), unless it has just done so.
        with contextlib.suppress(OSError):  # no thread can be started: the move is slow
            start_thread(threading.Thread(target=_move_nowhere, name="x07-groups", daemon=True))
    return groups


def _made(name: str, memory_bytes: int, tasks: int) -> HostGroups:
    limits = {"memory": memory_bytes, "pids": tasks}
    if (_ROOT / "cgroup.controllers").exists():
        with contextlib.suppress(OSError):
            if (parent := _parent_2()) is not None:
                folder = parent / name
                folder.mkdir()
                if _limited(folder, {_FILES[controller][0][0]: value for controller, value in limits.items()}):
                    return HostGroups(folders=(folder,), holds=tuple(limits))
        return HostGroups(folders=(), holds=())
    held = {}
    for controller, value in limits.items():
        if (made := _made_1(controller, name)) and _limited(made, {_FILES[controller][1][0]: value}):
            held[controller] = made
    return HostGroups(folders=tuple(held.values()), holds=tuple(held))


def _move_nowhere() -> None:
    """Move this process to the group where it already is."""
    version_2 = (_ROOT / "cgroup.controllers").exists()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
            _, controllers, place = line.split(":", 2)
            if controllers == ("" if version_2 else "pids") and ".." not in place:
                folder = _ROOT / controllers / place.lstrip("/")
                (folder / "cgroup.procs").write_text("0", encoding="ascii")  # stands for the process that writes


class ProgramGroups(HostGroups, frozen=True, kw_only=True):
    """Groups into which the agent puts a program. The agent sets the limits, so its user may write to the groups.

    places: the groups' folders, by controller in version 1, "" in version 2. agent: the agent's group (version 2).
    """

    places: dict[str, Path]
    agent: Path | None = None

    def add(self, pid: int) -> None:
        """Move the agent to a group from which it can move the program. Raises OSError if the kernel refuses."""
        if self.agent is not None:
            (self.agent / "cgroup.procs").write_text(str(pid), encoding="ascii")


def program_groups(name: str, *, uid: int) -> ProgramGroups:
    """Create groups called *name*, without limits, for *uid*. If the host provides none, the result has no folders.

    Version 1 works only for root: an ordinary user cannot move processes between groups of other users.
    """
    remove_abandoned_groups()
    if (_ROOT / "cgroup.controllers").exists():
        return _program_group_2(name, uid)
    places = {}
    for controller, (_, files) in _FILES.items():
        if os.geteuid() == 0 and (folder := _made_1(controller, name)):
            places[controller] = folder
            _delegate(folder, uid, files)
    return ProgramGroups(folders=tuple(places.values()), holds=tuple(places), places=places)


def _program_group_2(name: str, uid: int) -> ProgramGroups:
    """Create a group with two child groups: moving a process requires write access to a common parent group."""
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
            _delegate(folder, uid)
        _delegate(program, uid, ("cgroup.kill", *(file for files, _ in _FILES.values() for file in files)))
    except OSError:
        groups.remove()
        return nothing
    return msgspec.structs.replace(groups, holds=(*held, "cpuacct"))


def _delegate(folder: Path, uid: int, files: tuple[str, ...] = ()) -> None:
    """Let a user move processes into a group, and write to those of its *files* that this kernel has."""
    for file in ("cgroup.procs", *files):
        if (folder / file).exists():
            os.chown(folder / file, uid, uid)


def _parent_2() -> Path | None:
    """Return the version 2 group in which this process may create groups with controllers, or None if none exists."""
    parent = _ROOT / _PARENT if os.geteuid() == 0 else _own_group()
    try:
        if os.geteuid() == 0:
            parent.mkdir(exist_ok=True)
        elif not os.access(parent / "cgroup.procs", os.W_OK):
            return None  # moving a process there needs write access to this file
    except OSError:
        return None
    for folder in (*([_ROOT] if os.geteuid() == 0 else []), parent):
        for controller in ("memory", "pids"):
            with contextlib.suppress(OSError):  # the controller is not available
                (folder / "cgroup.subtree_control").write_text(f"+{controller}", encoding="ascii")
    return parent


def _own_group() -> Path:
    """Return the parent of this process's version 2 group. A group with processes cannot limit its children."""
    for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
        if line.startswith("0::"):
            return (_ROOT / line[3:].lstrip("/")).parent
    return _ROOT


def _made_1(controller: str, name: str) -> Path | None:
    """Create a group of version 1; return None if this user may not create it, or another job uses the name."""
    folder = _ROOT / controller / _PARENT / name
    with contextlib.suppress(OSError):
        if (_ROOT / controller / "cgroup.procs").exists():
            folder.mkdir(parents=True)
            return folder
    return None


def _limited(folder: Path, limits: dict[str, int]) -> bool:
    """Limit a new group. If the kernel refuses, remove the group and return False."""
    try:
        for file, value in limits.items():
            (folder / file).write_text(str(value), encoding="ascii")
    except OSError:
        with contextlib.suppress(OSError):
            folder.rmdir()
        return False
    return True


def _all_removed(folders: Iterable[Path]) -> bool:
    left = [folder for folder in folders if not _removed(folder)]  # each is tried
    return not left


def _removed(folder: Path) -> bool:
    for _ in range(50):
        try:
            folder.rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            time.sleep(0.01)  # the kernel releases the last task a moment after it was reaped
        else:
            return True
    return False


def remove_abandoned_groups() -> None:
    """Remove the empty groups that killed x07 processes left, except groups that may still be filled."""
    for parent in (_ROOT / _PARENT, *(_ROOT / controller / _PARENT for controller in _FILES)):
        with contextlib.suppress(OSError):
            for folder in list(parent.iterdir())[:_SWEPT_AT_ONCE]:
                if folder.is_dir() and _abandoned(folder):
                    for one in (folder / "program", folder / "agent", folder):
                        with contextlib.suppress(OSError):  # it holds a process
                            one.rmdir()


def _abandoned(folder: Path) -> bool:
    """Whether a group is abandoned: the x07 process in its name is dead, or had a minute to fill the group."""
    words = folder.name.split("-")
    runner = words[-1] if len(words) == _OF_LATER_MACHINE else words[1] if len(words) > 1 else ""
    if sees_every_process() and runner.isdigit() and identify(int(runner)) is None:
        return True
    return unix_ms() / 1000 - folder.stat().st_mtime > _ABANDONED_S
