"""The program's control group: limits that only the kernel can enforce, and counters that prove an outcome.

`RootGroup` is a version 2 group made by this process. `HostGroup` is a version 2 group made by the host. `HostGroupsV1`
is a set of version 1 groups made by the host, one per controller. `NoGroup` enforces nothing and reads CPU time from
/proc. For a command without a group of its own, /proc has its processes.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from typing import ClassVar, Final

from x07_sandbox.guest.system import children_of, read_file, write_file

_ROOT: Final = "/sys/fs/cgroup"
_GROUP: Final = f"{_ROOT}/x07"
_GONE_S: Final = 5.0
_STOPPED_S: Final = 2.0  # some system calls end late
# Each counter: its controller, its file in versions 2 and 1, and the keys of its lines if the file has several lines.
_COUNTERS: Final[tuple[tuple[str, ...], ...]] = (
    ("tasks_refused", "pids", "pids.events", "pids.events", "max"),
    ("tasks_peak", "pids", "pids.peak", "pids.peak"),
    ("memory_bytes", "memory", "memory.current", "memory.usage_in_bytes"),
    ("memory_peak_bytes", "memory", "memory.peak", "memory.max_usage_in_bytes"),
    ("oom_kills", "memory", "memory.events", "memory.oom_control", "oom_kill", "oom_group_kill"),
)

_PASSES: Final = 200
_PASS_S: Final = 0.001  # there is no event for a stopped process
_AT_REST: Final = frozenset("TtZXx")  # stopped, traced, or ended (proc(5))


class NoGroup:
    """No control group and no limits. CPU time is read in /proc, which omits children reaped while SIGCHLD was ignored.

    Subclasses are groups that contain the program and its children, but neither init (whose process id is *init*) nor
    the agent.
    KILLS: whether the group can kill all its processes. If not, init kills them. OF_COMMAND: whether it holds one
    command, not all.
    COUNTERS: for each counter, its control file, and the keys of the relevant lines if the file has several lines.
    shown: the group's folder that the program may read, or "" if there is none.
    """

    KILLS: ClassVar[bool] = False
    OF_COMMAND: ClassVar[bool] = False
    COUNTERS: ClassVar[dict[str, tuple[str, ...]]] = {}

    def __init__(self, folder: str = "") -> None:
        self._folder = folder
        self.shown = ""
        self._counters = self.COUNTERS
        self._limits = (0, 0)

    def of_command(self, key: int) -> NoGroup:  # noqa: ARG002
        """Return the group of one command: its own if this process can make it, else this one. Raises OSError."""
        return self

    def remove(self) -> None:
        """Remove the group if this process made it. Raises OSError."""

    def limit(self, *, mem_bytes: int, tasks: int) -> None:
        """Set these limits, unless the last call set the same limits."""
        if self._limits != (mem_bytes, tasks):
            self._limits = (mem_bytes, tasks)
            self._set_limits(mem_bytes, tasks)

    def _set_limits(self, mem_bytes: int, tasks: int) -> None:
        pass

    def open_procs(self) -> tuple[int, ...]:
        """Open the files to which a process writes "0" to join the group."""
        return ()

    def pids(self) -> list[int]:
        """Return the processes of the group; [] if they cannot be distinguished."""
        return []

    def kill(self, init: int) -> None:
        """Kill all processes of the group, if it KILLS."""

    def freeze(self, *, frozen: bool) -> bool:  # noqa: ARG002
        """Stop all processes of the group, or let them go on. Return whether they have stopped. Raises OSError."""
        return False

    def cpu_us(self, init: int) -> int:
        """Return the CPU time of all processes of the group, in microseconds."""
        return cpu_ticks(init) * 1_000_000 // os.sysconf("SC_CLK_TCK")

    def count(self, name: str) -> int:
        """Return the counter *name* (a key of COUNTERS), or 0 if the group lacks it."""
        if name not in self._counters:
            return 0
        file, *keys = self._counters[name]
        return counter(f"{self._folder}/{file}", keys)

    def program_stopped(self, init: int) -> bool:
        """Return whether a signal has stopped the program itself. Its children do not matter."""
        for pid in children_of(init)[:1]:
            if fields := stat_of(pid):
                return fields[0] in {"T", "t"}
        return False


class HostGroup(NoGroup):
    """A version 2 group at *folder*, made by the host, with the controllers that are available there."""

    KILLS = True
    COUNTERS: ClassVar[dict[str, tuple[str, ...]]] = {name: (file, *keys) for name, _, file, _, *keys in _COUNTERS}

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self._memory = os.path.exists(f"{folder}/memory.max")
        self._pids = os.path.exists(f"{folder}/pids.max")
        if self._memory:
            with contextlib.suppress(FileNotFoundError):  # needs swap accounting
                self._write("memory.swap.max", "0")
            # Out of memory kills the whole program: the state of a survivor would be unknown.
            self._write("memory.oom.group", "1")

    def _write(self, name: str, text: str) -> None:
        write_file(f"{self._folder}/{name}", text)

    def freeze(self, *, frozen: bool) -> bool:
        """Stop all processes of the group, or let them go on. If they do not stop in time, they go on."""
        self._write("cgroup.freeze", str(int(frozen)))
        if not frozen or self._stop():
            return frozen
        return self.freeze(frozen=False)

    def _stop(self) -> bool:
        """Wait until the processes have stopped. Return whether they did so in time."""
        until, poll = time.monotonic() + _STOPPED_S, select.poll()
        with open(f"{self._folder}/cgroup.events", "rb", buffering=0) as events:
            poll.register(events, select.POLLPRI)
            while (left_s := until - time.monotonic()) > 0:
                events.seek(0)
                if b"frozen 1" in events.read(4096):  # a later change is an event (cgroups(7))
                    return True
                poll.poll(left_s * 1000)
        return False

    def _set_limits(self, mem_bytes: int, tasks: int) -> None:
        if self._memory:
            self._write("memory.max", str(mem_bytes))
        if self._pids:
            self._write("pids.max", str(tasks))

    def open_procs(self) -> tuple[int, ...]:
        """Open the file through which a process joins the group."""
        return (_open_procs(self._folder),)

    def pids(self) -> list[int]:
        """Return the processes of the group. Raises OSError."""
        return [int(pid) for pid in read_file(f"{self._folder}/cgroup.procs").split()]

    def kill(self, init: int) -> None:  # noqa: ARG002
        """Kill all processes of the group."""
        self._write("cgroup.kill", "1")

    def cpu_us(self, init: int) -> int:  # noqa: ARG002
        """Return the CPU time, in microseconds."""
        return counter(f"{self._folder}/cpu.stat", ["usage_usec"])

    def program_stopped(self, init: int) -> bool:
        """Return whether a signal has stopped the program itself."""
        for pid in self.pids():
            # The program has joined first; reading all processes of a fork bomb would exceed the host's timeout.
            if (fields := stat_of(pid)) and int(fields[1]) == init:
                return fields[0] in {"T", "t"}
        return False


class RootGroup(HostGroup):
    """A version 2 group made by this process, which owns the whole hierarchy."""

    def __init__(self) -> None:
        write_file(f"{_ROOT}/cgroup.subtree_control", "+memory +pids +cpu")
        os.mkdir(_GROUP)
        super().__init__(_GROUP)
        self._write("memory.oom.group", "0")  # one command's group is killed, not all of them
        self._write("cpu.weight", "20")  # busy programs must not starve agent and init
        self._write("cgroup.subtree_control", "+memory +pids +cpu")

    def of_command(self, key: int) -> NoGroup:
        """Make the group of a command."""
        os.mkdir(f"{_GROUP}/{key}")
        return _CommandGroup(f"{_GROUP}/{key}")

    def remove(self) -> None:
        """Remove the groups once the kernel has released their last processes. Raises OSError."""
        for name in os.listdir(_GROUP):
            if os.path.isdir(f"{_GROUP}/{name}"):
                _remove(f"{_GROUP}/{name}")
        _remove(_GROUP)


class _CommandGroup(HostGroup):
    """The group of one command, which this process has made."""

    OF_COMMAND = True

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.shown = folder

    def remove(self) -> None:
        """Remove the group, unless a process of the command is left in it."""
        with contextlib.suppress(OSError):
            os.rmdir(self._folder)


def _remove(folder: str) -> None:
    deadline = time.monotonic() + _GONE_S
    while True:
        try:
            os.rmdir(folder)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.002)  # there is no event to wait for
        else:
            return


class HostGroupsV1(NoGroup):
    """Version 1 groups below *folder*, made by the host for the controllers memory, pids and cpuacct, if they exist."""

    COUNTERS: ClassVar[dict[str, tuple[str, ...]]] = {
        name: (f"{controller}/{file}", *keys) for name, controller, _, file, *keys in _COUNTERS
    }

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self._names = os.listdir(folder)

    def _set_limits(self, mem_bytes: int, tasks: int) -> None:
        if "memory" in self._names:
            # The limit with swap must never be below the one without.
            memory = f"{self._folder}/memory/memory"
            with contextlib.suppress(FileNotFoundError):  # needs swap accounting
                write_file(f"{memory}.memsw.limit_in_bytes", "-1")
            write_file(f"{memory}.limit_in_bytes", str(mem_bytes))
            with contextlib.suppress(FileNotFoundError):
                write_file(f"{memory}.memsw.limit_in_bytes", str(mem_bytes))
        if "pids" in self._names:
            write_file(f"{self._folder}/pids/pids.max", str(tasks))

    def open_procs(self) -> tuple[int, ...]:
        """Open the files through which a process joins the groups."""
        return tuple(_open_procs(f"{self._folder}/{name}") for name in self._names)

    def cpu_us(self, init: int) -> int:
        """Return the CPU time, in microseconds."""
        if "cpuacct" not in self._names:
            return super().cpu_us(init)
        return counter(f"{self._folder}/cpuacct/cpuacct.usage", []) // 1000


def host_group(folder: str) -> NoGroup:
    """Return the group of either version that the host has made at *folder*, or a `NoGroup` if there is none."""
    if os.path.exists(f"{folder}/cgroup.procs"):
        return HostGroup(folder)
    return HostGroupsV1(folder) if os.path.isdir(folder) else NoGroup()


def _open_procs(folder: str) -> int:
    return os.open(f"{folder}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)


def counter(path: str, keys: list[str]) -> int:
    """Return the number in a control file; with *keys*, the largest number after one of the keys; 0 if none exists."""
    most = 0
    try:
        for line in read_file(path).decode().splitlines():
            key, _, value = line.rpartition(" ")
            if not keys or key in keys:
                most = max(most, int(value))
    except (FileNotFoundError, ValueError):
        pass
    return most


def stat_of(pid: int) -> list[str]:
    """Return fields 3 and up of /proc/PID/stat (proc(5)), or an empty list if the process is gone."""
    try:
        return read_file(f"/proc/{pid}/stat").decode("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return []


def cpu_ticks(first: int) -> int:
    """Return the CPU time of a process, its reaped children and all its descendants, in clock ticks."""
    total = 0
    left = [first]
    while left:
        pid = left.pop()
        total += sum(int(word) for word in stat_of(pid)[11:15])  # utime, stime, cutime, cstime
        left += children_of(pid)
    return total


def pid_here(parent: int, inner: int) -> int:
    """Return the process id, as seen here, of the child of *parent* that is *inner* in its own namespace, or 0."""
    for pid in children_of(parent):
        with contextlib.suppress(OSError):
            for line in read_file(f"/proc/{pid}/status").splitlines():
                if line.startswith(b"NSpid:") and int(line.split()[-1]) == inner:
                    return pid
    return 0


def stopped_tree(leader: int) -> set[int]:
    """Stop a session leader, its descendants, and the other processes of their sessions. Return all of them.

    None can leave the tree once all are stopped. A process that had left tree and session before is not found. A leader
    that has just been forked may still be in the session of this process, which is not stopped.
    """
    tree, sessions, ours = {leader}, {leader}, os.getsid(0)
    for _ in range(_PASSES):
        found = {int(name): stat for name in os.listdir("/proc") if name.isdigit() and (stat := stat_of(int(name)))}
        size = 0
        while size < len(tree):
            size = len(tree)
            for pid, (_, parent, _, session, *_) in found.items():
                if pid in tree or int(parent) in tree or int(session) in sessions:
                    tree.add(pid)
                    sessions.update({int(session)} - {ours})
        moving = [pid for pid in tree if pid in found and found[pid][0] not in _AT_REST]
        if not moving:
            break
        for pid in moving:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGSTOP)
        time.sleep(_PASS_S)
    return tree
