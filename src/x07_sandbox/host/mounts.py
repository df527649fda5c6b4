"""Mounts of this process, from proc_pid_mountinfo(5)."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

_OCTAL: Final = re.compile(rb"\\([0-7]{3})")  # escapes of blanks and others


class Mounted(NamedTuple):
    """One mount. number: its id. place: mount point. kind: file system type."""

    number: int
    place: bytes
    kind: str


def mounts() -> Iterator[Mounted]:
    """Yield all mounts. Mounts on one mount point come lowest first. Raises OSError if /proc is missing."""
    with Path("/proc/self/mountinfo").open("rb") as file:
        for line in file:
            before, _, after = line.partition(b" - ")
            words = before.split(b" ")
            place = _OCTAL.sub(lambda found: bytes([int(found[1], 8)]), words[4])
            yield Mounted(int(words[0]), place, after.partition(b" ")[0].decode(errors="replace"))
