"""One input of the differential fuzzer: what a client sends, and when it waits for the server."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final, Literal

Mode = Literal["tls", "http", "any"]
Step = bytes | None
GOOD: Final = b"good.test"
"""The host for which each connection is opened."""
EVIL: Final = b"e0000000.evil.test"
"""A host that is not allowed. In the inputs of a campaign it has a number, of the same length."""
_NUMBERED: Final = re.compile(rb"e[0-9]{7}\.evil\.test")


@dataclass(frozen=True, slots=True)
class Case:
    """One input. steps: the reads of the client's bytes; None is a pause, in which the server may answer.

    half_close: whether the client then ends its bytes, or waits for the server to end the connection.
    """

    name: str
    mode: Mode
    steps: tuple[Step, ...]
    half_close: bool = False

    def numbered(self, number: int) -> Case:
        """Return the case with *number* in the name of each host that is not allowed."""
        data = _NUMBERED.sub(b"e%07d.evil.test" % number, b"".join(filter(None, self.steps)))
        steps: list[Step] = []
        for step in self.steps:  # the name can lie in two steps
            steps.append(None if step is None else data[: len(step)])
            data = data[len(step or b"") :]
        return replace(self, steps=tuple(steps))


def without_number(data: bytes) -> bytes:
    """Return *data* without the number of its case, to compare the bytes of different cases."""
    return _NUMBERED.sub(EVIL, data)
