"""Fuzz target: two texts, one of them a program's, and the patch between them.

An input is a byte that says where the rest is cut in two, in parts of 256. Applied to the first part with every line of
context compared, the hunks give the second; two equal texts give no hunks.
"""

from __future__ import annotations

import re
from typing import Final

from x07_sandbox.files.patch import PAIRS_MAX, Work, hunks

BYTES_MAX: Final = 250  # comparing takes quadratic time, up to a number of lines that the code itself bounds
_HEAD: Final = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@\n")
_NO_END: Final = b"\n\\ No newline at end of file\n"


def seeds() -> dict[str, bytes]:
    """Return two texts, which the first byte cuts apart."""
    return {
        "nothing": b"",
        "same": b"\x80a\nb\na\nb\n",
        "made": b"\x00a\nb\n",
        "removed": b"\xffa\nb\n",
        "no-line-end": b"\x80a\nb\na\nc",
        "far-apart": b"\x80" + b"".join(b"%d\n" % line for line in range(40)) + b"x\n" + b"1\n" * 38 + b"y\n",
        "empty-lines": b"\x60" + b"\n" * 90 + b"\r\n\x0b\n",
    }


def one_input(data: bytes) -> None:
    """Check one input. Raises AssertionError, or any exception that the code under test must not raise."""
    text = data[1 : BYTES_MAX + 1]
    cut = len(text) * (data[0] if data else 0) // 256
    old, new = text[:cut], text[cut:]
    found = list(hunks(old, new, Work(PAIRS_MAX)))
    assert bool(found) == (old != new)
    assert applied(lines(old), found) == new
    assert not list(hunks(new, new, Work(PAIRS_MAX)))


def lines(data: bytes) -> list[bytes]:
    """Return lines with their ends."""
    return re.findall(rb"[^\n]*\n|[^\n]+", data)


def applied(old: list[bytes], patch: list[bytes]) -> bytes:
    """Return the old text with the hunks applied."""
    out: list[bytes] = []
    at = 0
    left = [0, 0]
    for piece in patch:
        head = _HEAD.fullmatch(piece)
        if left == [0, 0] and head is not None:
            start, taken, _, made = (1 if number is None else int(number) for number in head.groups())
            start -= taken > 0
            out += old[at:start]
            at, left = start, [taken, made]
            continue
        line = piece[1 : -len(_NO_END)] if piece.endswith(_NO_END) else piece[1:]
        if piece[:1] in b" -":
            assert old[at] == line
            at += 1
            left[0] -= 1
        if piece[:1] in b" +":
            out.append(line)
            left[1] -= 1
    assert left == [0, 0]
    return b"".join([*out, *old[at:]])
