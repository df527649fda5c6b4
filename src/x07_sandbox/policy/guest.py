"""What a policy means inside the guest: paths of host folders, restrictions and limits of the program, and RAM.

There are only a few sizes of virtual machines, so that one prepared machine can serve many jobs.

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

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from x07_sandbox.channel.messages import CWD, OUT, CommandLimits, Confine
from x07_sandbox.host import settings
from x07_sandbox.policy.model import Limits

if TYPE_CHECKING:
    from x07_sandbox.policy.model import Policy

WORK: Final = f"{CWD}/work"  # the folder of --workdir
WRITABLE: Final = ("/tmp", "/dev/shm", CWD, OUT)  # noqa: S108 - the guest's own
# The guest's own tree: no host folder may be inside, above or on top of it.
_SYSTEM: Final = (
    *("/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/lost+found", CWD, "/proc"),
    *("/run", "/sbin", "/sys", "/usr", "/var", "/x07"),
)
_NOT_ON_TOP: Final = ("/tmp", "/opt")  # noqa: S108 - host folders may be inside, not on top
EVERYTHING: Final = "/"
BASE_FILTERS: Final = ("base", "quiet")
_UNLIMITED: Final = -1  # RLIM_INFINITY, as `ulimit -c unlimited` requests; the scratch disk bounds it

RAM_CLASSES: Final = (2 * settings.GIB, 8 * settings.GIB, 17 * settings.GIB)
FIXED_OVERHEAD_BYTES: Final = 160 * settings.MIB
OVERHEAD_DIVISOR: Final = 32


def guest_path(given: str, start: str, *, deny_hidden: bool) -> tuple[str | None, str]:
    """Return a root's guest path, or None and why it has none. start: CWD, WORK or a project's start folder.

    By the X07 language's rules, an absolute root has the same path in the guest. A relative root is below *start*.
    """
    if not given or "\0" in given:
        return None, "it is not a path"
    if deny_hidden and any(part.startswith(".") and part not in {".", ".."} for part in given.split("/")):
        return None, "it is hidden and fs.deny_hidden is true"
    if given.startswith("/"):
        path = "/" + posixpath.normpath(given).lstrip("/")
        own = next((own for own in _SYSTEM if path == own or is_below(path, own) or is_below(own, path)), None)
        if own is None and path in _NOT_ON_TOP:
            own = path
        return (path, "") if own is None else (None, f"it overlaps the sandbox's own {own}")
    relative = posixpath.normpath(given)
    if relative == ".." or relative.startswith("../"):
        return None, "a relative path must stay below the folder where the program starts; use an absolute path"
    return posixpath.normpath(f"{start}/{relative}"), ""


def is_below(path: str, folder: str) -> bool:
    """Return whether *path* is below *folder*. Both are normalized."""
    return path.startswith(folder.rstrip("/") + "/")


def filters_of(confine: Confine) -> tuple[str, ...]:
    """Return the names of the image's seccomp filters for a program (guest/boot/filters.py).

    A filter whose name ends in -once still allows the guest to execute the program itself.
    """
    words = (not confine.threads and "no-threads", not confine.spawn and "no-spawn", not confine.execute and "no-exec")
    name = "-".join(word for word in words if word)
    names = (*BASE_FILTERS, name, "" if confine.execute else f"{name}-once")
    return tuple(name for name in names if name)


def confinement(policy: Policy, cwd: str, *, alone: bool = False) -> Confine:
    """Return the confinement of a run with *policy*. cwd: the guest folder that relative paths start from."""
    process = policy.process
    listed = process.may_execute and not names_everything(process.allow_exec_prefixes)
    return Confine(
        threads=policy.threads_in_force.enabled,
        spawn=process.may_spawn,
        execute=process.may_execute,
        programs=[entry_path(path, cwd) for path in process.allow_execs] if listed else None,
        prefixes=[entry_path(path, cwd) for path in process.allow_exec_prefixes] if listed else [],
        alone=alone,
    )


def names_everything(prefixes: Iterable[object]) -> bool:
    """Return whether one of allow_exec_prefixes is the root folder, in any spelling."""
    return any(str(prefix).startswith("/") and entry_path(str(prefix), "/") == EVERYTHING for prefix in prefixes)


def entry_path(entry: str, cwd: str) -> str:
    """Return an entry of a list of programs as a normalized absolute path. A path of a folder ends with a slash."""
    path = "/" + posixpath.normpath(posixpath.join(cwd, entry)).lstrip("/")
    folder = entry.endswith(("/", "/.", "/..")) or entry in {".", ".."}
    return path if path == EVERYTHING or not folder else f"{path}/"


def prefixes_into(entries: Iterable[str], folders: Sequence[str], cwd: str) -> list[str]:
    """Return those prefixes in *entries* that match paths in one of the normalized *folders*."""
    found = []
    for entry in entries:
        path = entry_path(entry, cwd)
        if any(f"{folder}/".startswith(path) or path.startswith(f"{folder}/") for folder in folders):
            found.append(entry)
    return found


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
