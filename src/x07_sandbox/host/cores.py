"""How many cores there are for us: the host's, or fewer where affinity or a control group that we are in says so."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

from x07_sandbox.host.memory import group_files

_ROOT: Final = Path("/")


def cores(root: Path = _ROOT) -> int:
    """At least one; a share of one counts as one. root: where proc and sys are."""
    found = len(os.sched_getaffinity(0))
    for path in group_files(root, "cpu", "cpu.max", "cpu.cfs_quota_us"):
        with contextlib.suppress(OSError, ValueError):  # no such group here, or "max"
            words = path.read_text("ascii").split()
            if len(words) == 1:  # version 1 has two files
                words.append(path.with_name("cpu.cfs_period_us").read_text("ascii"))
            quota, period = map(int, words)
            if quota > 0 < period:  # -1: no limit
                found = min(found, -(-quota // period))
    return max(1, found)
