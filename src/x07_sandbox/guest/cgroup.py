"""The control group of the program: limits that only the kernel can hold, and the counters that prove an outcome.

`RootGroup` is a group of version 2 that this process makes, `GivenGroup` one that the host has made for it,
`GivenGroups` the same of version 1, one a controller. `NoGroup` counts CPU time by /proc, and holds nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Final, Protocol

from x07_sandbox.guest.confine import PROGRAM_PID
from x07_sandbox.guest.system import children_of, read_file, write_file

_ROOT: Final = "/sys/fs/cgroup"
_GROUP: Final = f"{_ROOT}/x07"
_GONE_S: Final = 5.0


class Group(Protocol):
    """What holds the program and its children, and neither our init nor the agent.

    KILLS: whether it can end all of its processes by itself; else init does it.
    In all that takes it, init is the process id of our init, whose first child is the program.
    """

    KILLS: bool

    def remove(self) -> None:
        """Remove it, once the kernel has let go of its last process. Raises OSError."""

    def limit(self, *, mem_bytes: int, tasks: int) -> None:
        """Set the job's limits, if they are others than before."""

    def open_procs(self) -> tuple[int, ...]:
        """Descriptors through which a process joins it by writing 0 to each."""

    def kill(self, init: int) -> None:
        """End every process in it."""

    def cpu_us(self, init: int) -> int:
        """CPU time of all its processes so far, in microseconds."""

    def oom_kills(self) -> int:
        """How often the kernel killed for memory in this group."""

    def tasks_refused(self) -> int:
        """How often a new task was refused at the limit."""

    def tasks_peak(self) -> int:
        """Most tasks at once."""

    def memory_bytes(self) -> int:
        """Memory now, in bytes."""

    def memory_peak_bytes(self) -> int:
        """Most memory at once, in bytes."""

    def program_stopped(self, init: int) -> bool:
        """Whether the program itself, whatever its children do, stands still by a signal."""


class _Files:
    """A folder of control files."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def read(self, name: str) -> bytes:
        """Raises OSError."""
        return read_file(f"{self.folder}/{name}")

    def write(self, name: str, text: str) -> None:
        """Raises OSError."""
        write_file(f"{self.folder}/{name}", text)

    def open_procs(self) -> int:
        """Its list of processes."""
        return os.open(f"{self.folder}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)

    def field(self, name: str, key: bytes) -> int:
        """A value of a file with one a line; 0 where there is none."""
        try:
            lines = self.read(name).splitlines()
        except FileNotFoundError:
            return 0
        for line in lines:
            found, _, value = line.partition(b" ")
            if found == key:
                return int(value)
        return 0

    def number(self, name: str) -> int:
        """The value that is a whole file; 0 where there is none."""
        try:
            return int(self.read(name))
        except (FileNotFoundError, ValueError):
            return 0


class GivenGroup:
    """A group of version 2 at *folder*, made by the host, with the controllers that it could have."""

    KILLS = True

    def __init__(self, folder: str) -> None:
        self._limits = (0, 0)
        self._files = _Files(folder)
        self._memory = os.path.exists(f"{folder}/memory.max")
        self._pids = os.path.exists(f"{folder}/pids.max")
        if self._memory:
            with contextlib.suppress(FileNotFoundError):  # only there in kernels with swap accounting
                self._files.write("memory.swap.max", "0")
            # One process killed for memory ends the whole program: a survivor in an unknown state is worth nothing.
            self._files.write("memory.oom.group", "1")

    def remove(self) -> None:
        """It is the host's to remove."""

    def limit(self, *, mem_bytes: int, tasks: int) -> None:
        """Set the job's limits, if they are others than before."""
        if self._limits == (mem_bytes, tasks):
            return
        self._limits = (mem_bytes, tasks)
        if self._memory:
            self._files.write("memory.max", str(mem_bytes))
        if self._pids:
            self._files.write("pids.max", str(tasks))

    def open_procs(self) -> tuple[int, ...]:
        """Descriptors through which a process joins it."""
        return (self._files.open_procs(),)

    def kill(self, _init: int) -> None:
        """End every process in it."""
        self._files.write("cgroup.kill", "1")

    def cpu_us(self, _init: int) -> int:
        """CPU time so far, in microseconds."""
        return self._files.field("cpu.stat", b"usage_usec")

    def oom_kills(self) -> int:
        """How often the kernel killed for memory."""
        files = self._files
        return max(files.field("memory.events", b"oom_kill"), files.field("memory.events", b"oom_group_kill"))

    def tasks_refused(self) -> int:
        """How often a new task was refused."""
        return self._files.field("pids.events", b"max")

    def tasks_peak(self) -> int:
        """Most tasks at once."""
        return self._files.number("pids.peak")

    def memory_bytes(self) -> int:
        """Memory now, in bytes."""
        return self._files.number("memory.current")

    def memory_peak_bytes(self) -> int:
        """Most memory at once, in bytes."""
        return self._files.number("memory.peak")

    def program_stopped(self, _init: int) -> bool:
        """Whether the program stands still by a signal."""
        for pid in self._files.read("cgroup.procs").decode().split():
            # It comes first, most likely: to ask all of a fork bomb takes longer than the host may wait for our word.
            if state := _state_of_program(pid):
                return state in "Tt"
        return False


class RootGroup(GivenGroup):
    """A group of version 2 that this process, which has the whole hierarchy, makes itself."""

    def __init__(self) -> None:
        write_file(f"{_ROOT}/cgroup.subtree_control", "+memory +pids +cpu")
        os.mkdir(_GROUP)
        super().__init__(_GROUP)
        self._files.write("cpu.weight", "20")  # agent and init must get their turn beside a busy program

    def remove(self) -> None:
        """Remove it, once the kernel has let go of its last process. Raises OSError."""
        deadline = time.monotonic() + _GONE_S
        while True:
            try:
                os.rmdir(_GROUP)
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.002)  # no event tells of it
            else:
                return


class NoGroup:
    """No group: nothing is held, and CPU time is what /proc has of the processes that there are.

    A child of whose end nobody wanted to know (SIGCHLD ignored) is not in that.
    """

    KILLS = False

    def remove(self) -> None:
        """There is none."""

    def limit(self, *, mem_bytes: int, tasks: int) -> None:
        """Nothing can be held."""

    def open_procs(self) -> tuple[int, ...]:
        """Descriptors through which a process joins it."""
        return ()

    def kill(self, init: int) -> None:
        """End every process in it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(init, signal.SIGTERM)

    def cpu_us(self, init: int) -> int:
        """CPU time so far, in microseconds."""
        return _cpu_ticks(init) * 1_000_000 // os.sysconf("SC_CLK_TCK")

    def oom_kills(self) -> int:
        """How often the kernel killed for memory."""
        return 0

    def tasks_refused(self) -> int:
        """How often a new task was refused."""
        return 0

    def tasks_peak(self) -> int:
        """Most tasks at once."""
        return 0

    def memory_bytes(self) -> int:
        """Memory now, in bytes."""
        return 0

    def memory_peak_bytes(self) -> int:
        """Most memory at once, in bytes."""
        return 0

    def program_stopped(self, init: int) -> bool:
        """Whether the program stands still by a signal."""
        for pid in children_of(init)[:1]:
            if fields := _stat(pid):
                return fields[0] in {"T", "t"}
        return False


class GivenGroups(NoGroup):
    """Groups of version 1 below *folder*, made by the host: those of memory, pids and cpuacct that are there."""

    def __init__(self, folder: str) -> None:
        self._limits = (0, 0)
        self._by_name = {name: _Files(f"{folder}/{name}") for name in os.listdir(folder)}

    def limit(self, *, mem_bytes: int, tasks: int) -> None:
        """Set the job's limits, if they are others than before."""
        if self._limits == (mem_bytes, tasks):
            return
        self._limits = (mem_bytes, tasks)
        if memory := self._by_name.get("memory"):
            # The one with swap may not be below the other, whichever way they change.
            swap = "memory.memsw.limit_in_bytes"
            with contextlib.suppress(FileNotFoundError):  # only there in kernels with swap accounting
                memory.write(swap, "-1")
            memory.write("memory.limit_in_bytes", str(mem_bytes))
            with contextlib.suppress(FileNotFoundError):
                memory.write(swap, str(mem_bytes))
        if pids := self._by_name.get("pids"):
            pids.write("pids.max", str(tasks))

    def open_procs(self) -> tuple[int, ...]:
        """Descriptors through which a process joins it."""
        return tuple(files.open_procs() for files in self._by_name.values())

    def cpu_us(self, init: int) -> int:
        """CPU time so far, in microseconds."""
        counted = self._by_name.get("cpuacct")
        return counted.number("cpuacct.usage") // 1000 if counted else super().cpu_us(init)

    def oom_kills(self) -> int:
        """How often the kernel killed for memory."""
        return self._field("memory", "memory.oom_control", b"oom_kill")

    def tasks_refused(self) -> int:
        """How often a new task was refused."""
        return self._field("pids", "pids.events", b"max")

    def tasks_peak(self) -> int:
        """Most tasks at once."""
        return self._number("pids", "pids.peak")

    def memory_bytes(self) -> int:
        """Memory now, in bytes."""
        return self._number("memory", "memory.usage_in_bytes")

    def memory_peak_bytes(self) -> int:
        """Most memory at once, in bytes."""
        return self._number("memory", "memory.max_usage_in_bytes")

    def _field(self, group: str, name: str, key: bytes) -> int:
        return self._by_name[group].field(name, key) if group in self._by_name else 0

    def _number(self, group: str, name: str) -> int:
        return self._by_name[group].number(name) if group in self._by_name else 0


def given_group(folder: str) -> Group:
    """The group that the host has put at *folder*, of whichever version; none where there is nothing."""
    if os.path.exists(f"{folder}/cgroup.procs"):
        return GivenGroup(folder)
    return GivenGroups(folder) if os.path.isdir(folder) else NoGroup()


def _stat(pid: int) -> list[str]:
    """Fields 3 and up of proc(5)'s stat; none where the process is gone."""
    try:
        return read_file(f"/proc/{pid}/stat").decode("utf-8", "replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _cpu_ticks(init: int) -> int:
    """CPU time of a process, of all that it has waited for, and of all below it."""
    total = 0
    left = [init]
    while left:
        pid = left.pop()
        total += sum(int(word) for word in _stat(pid)[11:15])  # utime, stime, cutime, cstime
        left += children_of(pid)
    return total


def _state_of_program(pid: str) -> str:
    """The state (proc(5)) of the first child of our init, which is PID 2 of its namespace; empty if it is another."""
    try:
        text = read_file(f"/proc/{pid}/status").decode("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
    fields = dict(line.partition(":")[::2] for line in text.splitlines())
    return fields["State"].split()[0] if fields["NSpid"].split()[-1] == str(PROGRAM_PID) else ""
