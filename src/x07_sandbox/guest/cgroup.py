"""The control group of the program: limits that only the kernel can hold, and the counters that prove an outcome.

`RootGroup` is a group of version 2 that this process makes, `GivenGroup` one that the host has made for it,
`GivenGroups` the same of version 1, one a controller. `NoGroup` counts CPU time by /proc, and holds nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import ClassVar, Final

from x07_sandbox.guest.confine import PROGRAM_PID
from x07_sandbox.guest.system import children_of, read_file, write_file

_ROOT: Final = "/sys/fs/cgroup"
_GROUP: Final = f"{_ROOT}/x07"
_GONE_S: Final = 5.0


class NoGroup:
    """No group: nothing is held, and CPU time is that of /proc, without children whose end was ignored (SIGCHLD).

    A group holds the program and its children, not our init (of which *init* is the process id) and the agent.
    KILLS: whether it can end all of its processes by itself; else init does it.
    COUNTERS: control files by what they count, then the keys of the lines that count, where there are several.
    SHOWN: the folder of the group that the program may read, empty for none.
    """

    KILLS: ClassVar[bool] = False
    COUNTERS: ClassVar[dict[str, tuple[str, ...]]] = {}
    SHOWN: ClassVar[str] = ""

    def __init__(self, folder: str = "") -> None:
        self._folder = folder
        self._limits = (0, 0)

    def remove(self) -> None:
        """Remove it, where it is ours, once the kernel has let go of its last process. Raises OSError."""

    def limit(self, *, mem_bytes: int, tasks: int) -> None:
        """Set the job's limits, if they are others than before."""
        if self._limits != (mem_bytes, tasks):
            self._limits = (mem_bytes, tasks)
            self._set_limits(mem_bytes, tasks)

    def _set_limits(self, mem_bytes: int, tasks: int) -> None:
        pass

    def open_procs(self) -> tuple[int, ...]:
        """Descriptors through which a process joins it by writing 0 to each."""
        return ()

    def kill(self, init: int) -> None:
        """End every process in it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(init, signal.SIGTERM)

    def cpu_us(self, init: int) -> int:
        """CPU time of all its processes so far, in microseconds."""
        return _cpu_ticks(init) * 1_000_000 // os.sysconf("SC_CLK_TCK")

    def count(self, what: str) -> int:
        """One of COUNTERS, 0 where there is none.

        oom_kills, tasks_refused (at the limit), tasks_peak, memory_bytes, memory_peak_bytes.
        """
        if what not in self.COUNTERS:
            return 0
        name, *keys = self.COUNTERS[what]
        return counter(f"{self._folder}/{name}", keys)

    def program_stopped(self, init: int) -> bool:
        """Whether the program itself, whatever its children do, stands still by a signal."""
        for pid in children_of(init)[:1]:
            if fields := _stat(pid):
                return fields[0] in {"T", "t"}
        return False


class GivenGroup(NoGroup):
    """A group of version 2 at *folder*, made by the host, with the controllers that it could have."""

    KILLS = True
    COUNTERS: ClassVar[dict[str, tuple[str, ...]]] = {
        "tasks_refused": ("pids.events", "max"),
        "tasks_peak": ("pids.peak",),
        "memory_bytes": ("memory.current",),
        "memory_peak_bytes": ("memory.peak",),
        "oom_kills": ("memory.events", "oom_kill", "oom_group_kill"),
    }

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self._memory = os.path.exists(f"{folder}/memory.max")
        self._pids = os.path.exists(f"{folder}/pids.max")
        if self._memory:
            with contextlib.suppress(FileNotFoundError):  # only there in kernels with swap accounting
                self._write("memory.swap.max", "0")
            # One process killed for memory ends the whole program: a survivor in an unknown state is worth nothing.
            self._write("memory.oom.group", "1")

    def _write(self, name: str, text: str) -> None:
        write_file(f"{self._folder}/{name}", text)

    def _set_limits(self, mem_bytes: int, tasks: int) -> None:
        if self._memory:
            self._write("memory.max", str(mem_bytes))
        if self._pids:
            self._write("pids.max", str(tasks))

    def open_procs(self) -> tuple[int, ...]:
        """Descriptors through which a process joins it."""
        return (_open_procs(self._folder),)

    def kill(self, init: int) -> None:  # noqa: ARG002 - of use to NoGroup
        """End every process in it."""
        self._write("cgroup.kill", "1")

    def cpu_us(self, init: int) -> int:  # noqa: ARG002 - as above
        """CPU time so far, in microseconds."""
        return counter(f"{self._folder}/cpu.stat", ["usage_usec"])

    def program_stopped(self, init: int) -> bool:  # noqa: ARG002 - as above
        """Whether the program stands still by a signal."""
        for pid in read_file(f"{self._folder}/cgroup.procs").decode().split():
            # It comes first, most likely: to ask all of a fork bomb takes longer than the host may wait for our word.
            if state := _state_of_program(pid):
                return state in "Tt"
        return False


class RootGroup(GivenGroup):
    """A group of version 2 that this process, which has the whole hierarchy, makes itself."""

    SHOWN = _GROUP

    def __init__(self) -> None:
        write_file(f"{_ROOT}/cgroup.subtree_control", "+memory +pids +cpu")
        os.mkdir(_GROUP)
        super().__init__(_GROUP)
        self._write("cpu.weight", "20")  # agent and init must get their turn beside a busy program

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


class GivenGroups(NoGroup):
    """Groups of version 1 below *folder*, made by the host: those of memory, pids and cpuacct that are there."""

    COUNTERS: ClassVar[dict[str, tuple[str, ...]]] = {
        "tasks_refused": ("pids/pids.events", "max"),
        "tasks_peak": ("pids/pids.peak",),
        "memory_bytes": ("memory/memory.usage_in_bytes",),
        "memory_peak_bytes": ("memory/memory.max_usage_in_bytes",),
        "oom_kills": ("memory/memory.oom_control", "oom_kill"),
    }

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self._names = os.listdir(folder)

    def _set_limits(self, mem_bytes: int, tasks: int) -> None:
        if "memory" in self._names:
            # The one with swap may not be below the other, whichever way they change.
            memory = f"{self._folder}/memory/memory"
            with contextlib.suppress(FileNotFoundError):  # only there in kernels with swap accounting
                write_file(f"{memory}.memsw.limit_in_bytes", "-1")
            write_file(f"{memory}.limit_in_bytes", str(mem_bytes))
            with contextlib.suppress(FileNotFoundError):
                write_file(f"{memory}.memsw.limit_in_bytes", str(mem_bytes))
        if "pids" in self._names:
            write_file(f"{self._folder}/pids/pids.max", str(tasks))

    def open_procs(self) -> tuple[int, ...]:
        """Descriptors through which a process joins them."""
        return tuple(_open_procs(f"{self._folder}/{name}") for name in self._names)

    def cpu_us(self, init: int) -> int:
        """CPU time so far, in microseconds."""
        if "cpuacct" not in self._names:
            return super().cpu_us(init)
        return counter(f"{self._folder}/cpuacct/cpuacct.usage", []) // 1000


def given_group(folder: str) -> NoGroup:
    """The group that the host has put at *folder*, of whichever version; none where there is nothing."""
    if os.path.exists(f"{folder}/cgroup.procs"):
        return GivenGroup(folder)
    return GivenGroups(folder) if os.path.isdir(folder) else NoGroup()


def _open_procs(folder: str) -> int:
    return os.open(f"{folder}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)


def counter(path: str, keys: list[str]) -> int:
    """The number in a control file, or the largest of the lines which begin with one of *keys*; 0 where none is."""
    most = 0
    try:
        for line in read_file(path).decode().splitlines():
            key, _, value = line.rpartition(" ")
            if not keys or key in keys:
                most = max(most, int(value))
    except (FileNotFoundError, ValueError):
        pass
    return most


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
