"""Hostile tar archives, made header by header."""

from __future__ import annotations

import struct
from typing import Final

BLOCK: Final = 512
END: Final = bytes(2 * BLOCK)


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
