"""What is mounted for this process, as proc_pid_mountinfo(5) has it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

_OCTAL: Final = re.compile(rb"\\([0-7]{3})")  # so it has blanks and the like


class Mounted(NamedTuple):
    """One mount. number: its id. place: where it is, as the kernel has the name. kind: of its file system."""

    number: int
    place: bytes
    kind: str


def mounts() -> Iterator[Mounted]:
    """All of them, of two at one place the lower one first. Raises OSError."""
    with Path("/proc/self/mountinfo").open("rb") as file:
        for line in file:
            before, _, after = line.partition(b" - ")
            words = before.split(b" ")
            place = _OCTAL.sub(lambda found: bytes([int(found[1], 8)]), words[4])
            yield Mounted(int(words[0]), place, after.partition(b" ")[0].decode(errors="replace"))
