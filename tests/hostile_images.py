"""Hostile tar archives: made header by header, and mutated from valid ones."""

from __future__ import annotations

import random
import struct
from typing import Final, TypeVar

BLOCK: Final = 512
END: Final = bytes(2 * BLOCK)

_T = TypeVar("_T")


def header(name: bytes | str = "a", size: int | bytes = 0, kind: bytes = b"0", link: str = "") -> bytes:
    """Return a header in the ustar format. size: a number, or the bytes of its field."""
    name = name.encode() if isinstance(name, str) else name
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    fields = (name, b"0000755\0", b"0000000\0", b"0000000\0", field, b"%011o\0" % 0, b" " * 8, kind, link.encode())
    return summed(struct.pack("100s8s8s8s12s12s8s1s100s8s247x", *fields, b"ustar\00000"))


def summed(block: bytes) -> bytes:
    """Return the header with the right checksum."""
    blank = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(blank) + block[156:]


def padded(data: bytes) -> bytes:
    """Return the bytes, filled up to whole blocks."""
    return data + bytes(-len(data) % BLOCK)


def record(key: str, value: str | bytes) -> bytes:
    """Return a record of an extended header."""
    body = b" %b=%b\n" % (key.encode(), value.encode() if isinstance(value, str) else value)
    size = len(body) + 1
    while len(b"%d%b" % (size, body)) != size:
        size += 1
    return b"%d%b" % (size, body)


def extended(*records: bytes, kind: bytes = b"x") -> bytes:
    """Return an extended header with its records."""
    data = b"".join(records)
    return header("x", len(data), kind) + padded(data)


def binary(size: int) -> bytes:
    """Return a size in base 256, as GNU tar writes large ones."""
    return (size + (1 << 95) if size >= 0 else size + (1 << 96)).to_bytes(12)


def file(data: bytes = b"", name: str = "a") -> bytes:
    """Return a file's entry."""
    return header(name, len(data)) + padded(data)


HOSTILE: Final[dict[str, bytes]] = {
    "chained headers": extended(record("mtime", "1")) * 3000 + file() + END,
    "a size of 2^62": header(size=binary(1 << 62)) + END,
    "a size of 2^62 in a record": extended(record("size", str(1 << 62))) + file() + END,
    "a negative size": header(size=binary(-512)) + END,
    "a negative real size": extended(record("GNU.sparse.realsize", "-1")) + file(b"1") + END,
    "content past the end": header(size=1 << 20) + bytes(BLOCK),
    "a truncated content": file(bytes(4 * BLOCK))[: 3 * BLOCK],
    "a truncated header": file(b"1") + file()[:100],
    "a truncated extended header": extended(record("path", "p" * 600))[:600],
    "a header of 40 GiB": header(size=40 << 30, kind=b"x") + END,
    "a name of 40 GiB": header(size=40 << 30, kind=b"L") + END,
}
"""Archives that ended in a traceback, or in gigabytes."""

NAMES: Final = ["a", "a/b", "d/", "d/c", "l", "l/x", "./a/", "/etc/passwd", "a/.wh.b", "d/.wh..wh..opq", ".wh.l"]
ODD_NAMES: Final = ["", ".", "../up", "d/../e", "proc", "opt/x07", "x07/y", "\u00e9", "\x1b[2J", "a/" * 45 + "a"]
LINKS: Final = ["a", "/a", "d", "..", "../..", "l", "none", "", "a/b", "x" * 99]
KINDS: Final = [b"0", b"1", b"2", b"2", b"3", b"5", b"5", b"5", b"6", b"7", b"\0"]
ODD_KINDS: Final = [b"S", b"V", b"X", b"?"]
SIZES: Final = [1, 511, 512, 513, 4096, 1 << 20, 40 << 30, 1 << 62, (1 << 95) - 1, -1, -512]
KEYS: Final = ["path", "linkpath", "size", "uid", "gid", "mtime", "uname", "hdrcharset", "SCHILY.xattr.user.a"]
ODD_KEYS: Final = [*(f"GNU.sparse.{key}" for key in ("realsize", "size", "map", "name", "major")), "SCHILY.realsize"]
VALUES: Final = [b"", b"a", b"a/b", b"1", b"512", b"70000"]
ODD_VALUES: Final = [b"../up", b"-1", b"1.5", b"4611686018427387904", b"\xff\0", b"p" * 300]


def mutated(seed: int) -> bytes:
    """Return an archive, perhaps with hostile entries and damage: the same one for the same seed."""
    rng = random.Random(seed)  # noqa: S311 - for tests
    parts = [_entry(rng) for _ in range(rng.randrange(1, 8))]
    for _ in range(rng.choice([0, 0, 1, 3])):  # entries again, and in another order
        parts.insert(rng.randrange(len(parts) + 1), rng.choice(parts) * rng.choice([1, 1, 2, 40]))
    return damaged(rng, b"".join(parts) + END)


def _odd(rng: random.Random, usual: list[_T], odd: list[_T], per_cent: int = 5) -> _T:
    """Return one of the usual values, or seldom an odd one."""
    return rng.choice(odd if rng.randrange(100) < per_cent else usual)


def _entry(rng: random.Random) -> bytes:
    name, before = _odd(rng, NAMES, ODD_NAMES), b""
    if _odd(rng, [False], [True], 25):
        keys = [_odd(rng, KEYS, ODD_KEYS) for _ in range(rng.randrange(4))]
        before += extended(
            *(record(key, _odd(rng, VALUES, ODD_VALUES)) for key in keys), kind=_odd(rng, [b"x"], [b"g"])
        )
    if _odd(rng, [False], [True], 10):
        long = _odd(rng, VALUES, ODD_VALUES) + b"\0"
        before += header("././@LongLink", len(long), rng.choice([b"L", b"K"])) + padded(long)
    if rng.randrange(2):
        return before + file(rng.randbytes(rng.choice([0, 1, 511, 512, 513, 3000])), name)
    size = _odd(rng, [0], SIZES, 10)
    return before + header(
        name, binary(size) if not 0 <= size < 1 << 33 else size, _odd(rng, KINDS, ODD_KINDS), rng.choice(LINKS)
    )


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Return the archive, perhaps cut off, with blocks lost, repeated or overwritten."""
    for _ in range(rng.choice([0, 0, 0, 1, 2, 8])):
        at = rng.randrange(len(data) + 1)
        block = at - at % BLOCK
        how = rng.choice(["cut", "lose", "repeat", "field", "field"])
        if how == "cut":
            data = data[:at]
        elif how == "lose":
            data = data[:block] + data[block + BLOCK :]
        elif how == "repeat":
            other = rng.randrange(len(data) // BLOCK + 1) * BLOCK
            data = data[:block] + data[other : other + rng.randrange(3) * BLOCK] + data[block:]
        else:  # of a header: name, mode, owner, size, checksum, type, magic
            first, last = rng.choice([(0, 9), (100, 108), (108, 116), (124, 136), (148, 156), (156, 157), (257, 263)])
            data = data[: block + first] + rng.randbytes(last - first) + data[block + last :]
    return data
