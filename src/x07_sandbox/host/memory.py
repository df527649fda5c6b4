"""Available memory and cores: the host's, or fewer if a cgroup or a CPU affinity limits this process. Memory files."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from x07_sandbox.host.linux import allowed_cores, new_memory_file
from x07_sandbox.host.poll import write_all

_ROOT: Final = Path("/")
_GROUPS: Final = "sys/fs/cgroup"


def memory_bytes(root: Path = _ROOT) -> int:
    """Return the available memory in bytes. root: the folder that contains proc and sys."""
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in group_files(root, "memory", "memory.max", "memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such cgroup, or "max"
            found = min(found, int(path.read_text("ascii")))
    return found


def spare_bytes(root: Path = _ROOT) -> int:
    """Return how much memory new processes can get without swapping, or 0 if unknown. root: the folder of proc and sys.

    The limit of a container counts as if nothing of it were used, since most of what is used are cached files.
    """
    with contextlib.suppress(OSError):
        for line in (root / "proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return min(memory_bytes(root), int(line.split()[1]) << 10)
    return 0


def group_files(root: Path, controller: str, name: str, old_name: str) -> Iterator[Path]:
    """Yield files that may contain a memory or CPU limit, from all cgroups of this process.

    name: the file's name in cgroup v2. old_name: the file's name in cgroup v1.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            folder, file = root / _GROUPS, name
        elif controller in controllers.split(","):
            folder, file = root / _GROUPS / controller, old_name
        else:
            continue
        yield folder / file
        for part in group.strip("/").split("/"):
            folder /= part
            yield folder / file


def memory_file(data: bytes) -> int:
    """Return a file in memory with the content *data*, at offset 0. The caller owns the returned descriptor."""
    fd = new_memory_file()
    try:
        write_all(fd, data)
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd


def cores(root: Path = _ROOT) -> int:
    """Return how many cores this process may use; part of a core counts as one. root: the folder of proc and sys."""
    found = allowed_cores()
    for path in group_files(root, "cpu", "cpu.max", "cpu.cfs_quota_us"):
        with contextlib.suppress(OSError, ValueError):  # no such cgroup, or "max"
            words = path.read_text("ascii").split()
            if len(words) == 1:  # cgroup v1 has two files
                words.append(path.with_name("cpu.cfs_period_us").read_text("ascii"))
            quota, period = map(int, words)
            if quota > 0 < period:  # -1: no limit
                found = min(found, -(-quota // period))
    return max(1, found)
