"""Available cores: the host's, or fewer if a CPU affinity or a cgroup limits this process."""

import contextlib
from pathlib import Path
from typing import Final

from x07_sandbox.host.linux import allowed_cores
from x07_sandbox.host.memory import group_files

_ROOT: Final = Path("/")


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
