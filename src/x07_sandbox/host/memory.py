"""How much memory there is for us: the host's, or less where a control group that we are in allows less."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROOT: Final = Path("/")
_GROUPS: Final = "sys/fs/cgroup"


def memory_bytes(root: Path = _ROOT) -> int:
    """Bytes. root: where proc and sys are (cgroups(7): in a container its own group is the root of what it sees)."""
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in group_files(root, "memory", "memory.max", "memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such group here, or "max"
            found = min(found, int(path.read_text("ascii")))
    return found


def group_files(root: Path, controller: str, name: str, old_name: str) -> Iterator[Path]:
    """Files that may hold a limit: of each group that we are in, and of all above it. old_name: in version 1."""
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
