"""How much RAM a virtual machine has: few sizes, so that one warmed machine can serve many jobs.

| RAM of the machine | largest limits.mem_bytes |
|---|---|
| 2 GiB | 1830 MiB |
| 8 GiB | 7788 MiB |
| 17 GiB | 16 GiB, the largest that a policy may ask for |

A control group in the guest holds limits.mem_bytes. The machine has more: 160 MiB for kernel, agent and image, and 1/32
for the kernel's bookkeeping. Were it too small, its kernel would choose a victim, and that would be no honest `oom`.
RAM is taken from the host as the guest touches it, so a small program in a machine of 2 GiB takes no more than it would
in a smaller one, and every run of ordinary size is a clone of the same saved machine.
"""

from __future__ import annotations

from typing import Final

from x07_sandbox.host import settings
from x07_sandbox.policy.model import Limits

_MIB: Final = 1 << 20
_GIB: Final = 1 << 30
_UNLIMITED: Final = -1  # Linux's RLIM_INFINITY: what scripts ask for (ulimit -c unlimited); the scratch disk bounds it

RAM_CLASSES: Final = (2 * _GIB, 8 * _GIB, 17 * _GIB)
FIXED_OVERHEAD_BYTES: Final = 160 * _MIB
OVERHEAD_DIVISOR: Final = 32


def guest_limits(*, mem_bytes: int, tasks: int, cpu_ms: int, fds: int, core_dumps: bool) -> dict[str, int]:
    """The agent's share of a plan: what START carries as `limits`."""
    return {
        "mem_bytes": mem_bytes,
        "tasks": tasks,
        "cpu_ms": cpu_ms,
        "fds": fds,
        "core_bytes": _UNLIMITED if core_dumps else 0,
        "tmp_bytes": max(65536, mem_bytes // settings.TMP_SHARE),
    }


def build_limits(wall_ms: int | None = None) -> dict[str, int]:
    """Those of a build. wall_ms: the time it may take, as CPU time too; None for the usual."""
    return guest_limits(
        mem_bytes=settings.BUILD_MEM_BYTES,
        tasks=settings.BUILD_TASKS,
        cpu_ms=wall_ms or settings.BUILD_CPU_MS,
        fds=settings.BUILD_FDS,
        core_dumps=False,
    )


def build_limits_shown(wall_ms: int | None = None) -> Limits:
    """Those of a build, as a policy would name them: for reasons. wall_ms: as above."""
    return Limits(
        cpu_ms=wall_ms or settings.BUILD_CPU_MS,
        wall_ms=wall_ms or settings.BUILD_WALL_MS,
        mem_bytes=settings.BUILD_MEM_BYTES,
        fds=settings.BUILD_FDS,
        procs=settings.BUILD_TASKS - 1,
        core_dumps=False,
    )


def ram_class_bytes(mem_bytes: int) -> int:
    """The smallest size of machine, in bytes, for a program with *mem_bytes*; ValueError where none is large enough."""
    needed = _with_overhead(mem_bytes)
    for size in RAM_CLASSES:
        if size >= needed:
            return size
    raise ValueError(f"no machine is large enough for {mem_bytes} bytes")


def used_ram_bytes(ram_bytes: int, mem_bytes: int, cached_bytes: int) -> int:
    """The most of a machine's RAM that one job uses: the program's memory, the overhead, and files in the page cache.

    cached_bytes: of files that the agent writes or reads for the job, whose pages no control group in the guest holds.
    """
    return min(ram_bytes, _with_overhead(mem_bytes) + cached_bytes)


def _with_overhead(mem_bytes: int) -> int:
    return mem_bytes + FIXED_OVERHEAD_BYTES + -(-mem_bytes // OVERHEAD_DIVISOR)
