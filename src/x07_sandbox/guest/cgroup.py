"""The control group of the program: limits that only the kernel can hold, and the counters that prove an outcome."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Final

from x07_sandbox.guest.confine import PROGRAM_PID
from x07_sandbox.guest.system import read_file, write_file

_ROOT: Final = "/sys/fs/cgroup"
_GROUP: Final = f"{_ROOT}/x07"
_GONE_S: Final = 5.0


class ProgramGroup:
    """One cgroup v2 group that holds the program and its children, and neither our init nor the agent."""

    def __init__(self) -> None:
        self._limits = (0, 0)
        write_file(f"{_ROOT}/cgroup.subtree_control", "+memory +pids +cpu")
        os.mkdir(_GROUP)
        with contextlib.suppress(FileNotFoundError):  # only there in kernels with swap accounting
            self._write("memory.swap.max", "0")
        # One process killed for memory ends the whole program: a survivor in an unknown state is worth nothing.
        self._write("memory.oom.group", "1")
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

    def limit(self, *, mem_bytes: int, tasks: int) -> None:
        """Set the job's limits, if they are others than before."""
        if self._limits == (mem_bytes, tasks):
            return
        self._limits = (mem_bytes, tasks)
        self._write("memory.max", str(mem_bytes))
        self._write("pids.max", str(tasks))

    def open_procs(self) -> int:
        """A descriptor through which a process joins the group by writing 0."""
        return os.open(f"{_GROUP}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)

    def kill(self) -> None:
        """SIGKILL every process of the group."""
        self._write("cgroup.kill", "1")

    def cpu_us(self) -> int:
        """CPU time of all its processes so far, in microseconds."""
        return self._field("cpu.stat", b"usage_usec")

    def oom_kills(self) -> int:
        """How often the kernel killed for memory in this group."""
        return max(self._field("memory.events", b"oom_kill"), self._field("memory.events", b"oom_group_kill"))

    def tasks_refused(self) -> int:
        """How often a new task was refused at the limit."""
        return self._field("pids.events", b"max")

    def tasks_peak(self) -> int:
        """Most tasks at once."""
        return self._number("pids.peak")

    def memory_bytes(self) -> int:
        """Memory now, in bytes."""
        return self._number("memory.current")

    def memory_peak_bytes(self) -> int:
        """Most memory at once, in bytes."""
        return self._number("memory.peak")

    def program_stopped(self) -> bool:
        """Whether the program itself, whatever its children do, stands still by a signal."""
        for pid in self._read("cgroup.procs").decode().split():
            # It comes first, most likely: to ask all of a fork bomb takes longer than the host may wait for our word.
            if state := _state_of_program(pid):
                return state in "Tt"
        return False

    def _read(self, name: str) -> bytes:
        return read_file(f"{_GROUP}/{name}")

    def _write(self, name: str, text: str) -> None:
        write_file(f"{_GROUP}/{name}", text)

    def _field(self, name: str, key: bytes) -> int:
        for line in self._read(name).splitlines():
            found, _, value = line.partition(b" ")
            if found == key:
                return int(value)
        return 0

    def _number(self, name: str) -> int:
        try:
            return int(self._read(name))
        except (FileNotFoundError, ValueError):
            return 0


def _state_of_program(pid: str) -> str:
    """The state (proc(5)) of the first child of our init, which is PID 2 of its namespace; empty if it is another."""
    try:
        text = read_file(f"/proc/{pid}/status").decode("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
    fields = dict(line.partition(":")[::2] for line in text.splitlines())
    return fields["State"].split()[0] if fields["NSpid"].split()[-1] == str(PROGRAM_PID) else ""
