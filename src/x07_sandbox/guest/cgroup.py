"""The control group of the program: limits that only the kernel can hold, and the counters that prove an outcome."""

from __future__ import annotations

import contextlib
import os
from typing import Final

from x07_sandbox.guest.confine import PROGRAM_PID

_ROOT: Final = "/sys/fs/cgroup"
_GROUP: Final = f"{_ROOT}/x07"


class ProgramGroup:
    """One cgroup v2 group that holds the program and its children, and neither our init nor the agent."""

    def __init__(self) -> None:
        self._limits = (0, 0)
        _write(f"{_ROOT}/cgroup.subtree_control", "+memory +pids +cpu")
        os.mkdir(_GROUP)
        with contextlib.suppress(FileNotFoundError):  # only there in kernels with swap accounting
            _write(f"{_GROUP}/memory.swap.max", "0")
        # One process killed for memory ends the whole program: a survivor in an unknown state is worth nothing.
        _write(f"{_GROUP}/memory.oom.group", "1")
        _write(f"{_GROUP}/cpu.weight", "20")  # agent and init must get their turn beside a busy program

    def limit(self, *, mem_bytes: int, tasks: int) -> None:
        """Set the job's limits, if they are others than before."""
        if self._limits == (mem_bytes, tasks):
            return
        self._limits = (mem_bytes, tasks)
        _write(f"{_GROUP}/memory.max", str(mem_bytes))
        _write(f"{_GROUP}/pids.max", str(tasks))

    def open_procs(self) -> int:
        """A descriptor through which a process joins the group by writing 0."""
        return os.open(f"{_GROUP}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)

    def kill(self) -> None:
        """SIGKILL every process of the group."""
        _write(f"{_GROUP}/cgroup.kill", "1")

    def cpu_us(self) -> int:
        """CPU time of all its processes so far, in microseconds."""
        return _field("cpu.stat", "usage_usec")

    def oom_kills(self) -> int:
        """How often the kernel killed for memory in this group."""
        return max(_field("memory.events", "oom_kill"), _field("memory.events", "oom_group_kill"))

    def tasks_refused(self) -> int:
        """How often a new task was refused at the limit."""
        return _field("pids.events", "max")

    def tasks_peak(self) -> int:
        """Most tasks at once."""
        return _number("pids.peak")

    def memory_peak_bytes(self) -> int:
        """Most memory at once, in bytes."""
        return _number("memory.peak")

    def program_stopped(self) -> bool:
        """Whether the program itself, whatever its children do, stands still by a signal."""
        with open(f"{_GROUP}/cgroup.procs", encoding="ascii") as procs:
            pids = procs.read().split()
        return any(_is_stopped_program(pid) for pid in pids)


def _is_stopped_program(pid: str) -> bool:
    """Whether it is the first child of our init, which is PID 2 of its namespace, and stopped."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            fields = dict(line.partition(":")[::2] for line in file)
    except (FileNotFoundError, ProcessLookupError):
        return False
    return fields["NSpid"].split()[-1] == str(PROGRAM_PID) and fields["State"].split()[0] in "Tt"


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def _field(name: str, key: str) -> int:
    with open(f"{_GROUP}/{name}", encoding="ascii") as file:
        for line in file:
            found, _, value = line.partition(" ")
            if found == key:
                return int(value)
    return 0


def _number(name: str) -> int:
    try:
        with open(f"{_GROUP}/{name}", encoding="ascii") as file:
            return int(file.read())
    except (FileNotFoundError, ValueError):
        return 0
