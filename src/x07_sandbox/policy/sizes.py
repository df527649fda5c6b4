"""RAM sizes of virtual machines. There are only a few sizes, so that one prepared machine can serve many jobs.

| RAM of the machine | largest limits.mem_bytes |
|---|---|
| 2 GiB | 1830 MiB |
| 8 GiB | 7788 MiB |
| 17 GiB | 16 GiB, the maximum of a policy |

A cgroup in the guest enforces limits.mem_bytes. The machine needs 160 MiB more for kernel, agent and image, and 1/32
for the kernel's bookkeeping. If the machine were too small, the guest's kernel would choose a process to kill, and the
outcome `oom` would be wrong. The host allocates RAM only when the guest touches it, so a small program in a large
machine costs no extra memory.
"""

from typing import Final

from x07_sandbox.channel.messages import CommandLimits
from x07_sandbox.host import settings
from x07_sandbox.policy.model import Limits

_MIB: Final = 1 << 20
_GIB: Final = 1 << 30
_UNLIMITED: Final = -1  # RLIM_INFINITY, as `ulimit -c unlimited` requests; the scratch disk bounds it

RAM_CLASSES: Final = (2 * _GIB, 8 * _GIB, 17 * _GIB)
FIXED_OVERHEAD_BYTES: Final = 160 * _MIB
OVERHEAD_DIVISOR: Final = 32


def command_limits(limits: Limits, tasks: int) -> CommandLimits:
    """Return the limits of a command, which the agent enforces. tasks: the most processes and threads."""
    return CommandLimits(
        mem_bytes=limits.mem_bytes,
        tasks=tasks,
        cpu_ms=limits.cpu_ms,
        fds=limits.fds,
        core_bytes=_UNLIMITED if limits.core_dumps else 0,
    )


def tmp_bytes(mem_bytes: int) -> int:
    """Return the size of /tmp and of /dev/shm for a program with *mem_bytes*."""
    return max(65536, mem_bytes // settings.TMP_SHARE)


def build_limits(wall_ms: int | None = None) -> Limits:
    """Return the limits of a build. wall_ms: the time limit, which also limits CPU time; None for the default."""
    return Limits(
        cpu_ms=wall_ms or settings.BUILD_CPU_MS,
        wall_ms=wall_ms or settings.BUILD_WALL_MS,
        mem_bytes=settings.BUILD_MEM_BYTES,
        fds=settings.BUILD_FDS,
        procs=settings.BUILD_TASKS - 1,
    )


def ram_class_bytes(mem_bytes: int) -> int:
    """Return the smallest machine size for a program with *mem_bytes*. Raises ValueError if no size is large enough."""
    needed = _with_overhead(mem_bytes)
    for size in RAM_CLASSES:
        if size >= needed:
            return size
    raise ValueError(f"no VM is large enough for {mem_bytes} bytes")


def used_ram_bytes(ram_bytes: int, mem_bytes: int, cached_bytes: int) -> int:
    """Return the most RAM that one job uses: program memory, overhead and page cache.

    cached_bytes: the size of the files that the agent reads or writes. No cgroup in the guest limits their cache.
    """
    return min(ram_bytes, _with_overhead(mem_bytes) + cached_bytes)


def _with_overhead(mem_bytes: int) -> int:
    return mem_bytes + FIXED_OVERHEAD_BYTES + -(-mem_bytes // OVERHEAD_DIVISOR)
