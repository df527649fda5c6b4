"""A hundred names that a program may give to files, or a broken guest may send, for tests of what prints them."""

from __future__ import annotations

import os
import unicodedata
from typing import Final

# fmt: off
_ESCAPES: Final = [
    b"\x1b[2J", b"\x1b[31mred", b"\x1b]0;title\x07", b"\x1b]8;;evil:x\x1b\\link", b"\x1bc",
    b"\x1b[?1049h", b"\x1b[6n", b"\x1bP+q544e\x1b\\", b"\x1b_payload\x1b\\", b"\x1b^private\x1b\\", b"\x1b[8m",
    b"a\x1b",
]
_LINES: Final = [
    b"a\nx07: forged", b"\nx07: forged", b"a\n  x07: forged", b"a\r\nx07: forged", b"good\rx07: forged", b"\n", b"\r",
    b"a\n\n\nb", b"a\x0bb", b"a\x0cb", "a\u2028x07: forged".encode(), "a\u2029x07: forged".encode(), "a\x85b".encode(),
]
_CONTROLS: Final = [
    b"\x01", b"\x07\x07\x07", b"bad\x08\x08\x08good", b"\x7f\x7f", b"a\tb", b"\x0e\x0f", b"\x1f",
    b"\x18\x1a", b"\x05",
]
_C1_BYTES: Final = [
    b"\x9b2J", b"\x9b31m", b"a\x9bb", b"\x90payload\x9c", b"\x9d0;title\x9c", b"\x84\x85\x8d", b"\x80\x9f", b"\x9b\n",
]
_C1_POINTS: Final = [
    "\x9b2J".encode(), "\x9b31m".encode(), "\x9d0;title\x9c".encode(), "\x90q\x9c".encode(), "\x84\x8d".encode(),
    "".join(map(chr, range(0x80, 0xA0))).encode(),
]
_NOT_UTF8: Final = [
    b"caf\xe9", b"\xff\xfe", b"\xc2", b"\xe2\x82", b"\xc0\xaf", b"\xed\xa0\x80", b"\xed\xb2\x9b", b"\xf4\x90\x80\x80",
    b"\xf8\x88\x80\x80\x80", b"\xc2\x9b\x9b", b"ok\xffok", b"\xef\xbf",
]
_UNSEEN: Final = [
    text.encode() for text in (
        "\u202egpj.exe", "\u202dab\u202c", "\u2066x\u2069", "\u200e\u200f", "\u061c", "\u200b", "a\u200db", "\u2060",
        "\ufeff", "\u00ad", "a\ufe0f", "\U000e0100", "\U000e0041\U000e0042", "\u180e", "\u3164", "\u115f", "\u2800",
        "\u034f", "\u17b4", "\ufff9x\ufffb", "\ue000", "\U0010ffff", "\u00a0", "\u3000", "\u2003",
    )
]
_ORDINARY: Final = [
    text.encode() for text in (
        "Zoë", "木", "e\u0301", "a" + "\u0301" * 60, "x" * 255, " ", "a  b", "-rf", "--json", "'quoted'", '"quoted"',
    )
]
# fmt: on
# Text that no file of Linux can have as its name, such as UTF-8 as two lone surrogates.
_IMPOSSIBLE: Final = ["\udcc2\udc9b31m", "\ud800", "\udfff\ud83d", "x" * 4000]

FILES: Final = [*_ESCAPES, *_LINES, *_CONTROLS, *_C1_BYTES, *_C1_POINTS, *_NOT_UTF8, *_UNSEEN, *_ORDINARY]
"""Names that files can have."""
NAMES: Final = [*map(os.fsdecode, FILES), *_IMPOSSIBLE]
"""All of them, as Python has them."""

_HIDING: Final = {
    *map(chr, (0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0)),
    *map(chr, range(0xFE00, 0xFE10)),
    *map(chr, range(0xE0100, 0xE01F0)),
}


def unseen(text: bytes | str, kept: str = "\n") -> set[str]:
    """Return the characters of printed text that a terminal obeys, or that cannot be seen."""
    found = text.decode() if isinstance(text, bytes) else text  # strictly: bytes that are not UTF-8 may be C1 controls
    odd = {char for char in found if char != " " and unicodedata.category(char)[0] in "CZ"}
    return (odd | (_HIDING & set(found))) - set(kept)
