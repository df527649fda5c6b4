"""Random connections of HTTP/2 with prior knowledge, and of TLS."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tests.fuzz.differential.case import EVIL, GOOD, Step
from tests.fuzz.differential.corpus import BAD_GET, GET, PREFACE, SSL_REQUEST, field, frame
from tests.fuzz.tls import extension, hello, records, sni

if TYPE_CHECKING:
    from random import Random

_SETTINGS: Final = (
    *(b"", b"", b"\0\1\0\0\0\0", b"\0\3\0\0\0\1", b"\0\4\0\0\0\0", b"\0\1\0\1\0\0", b"\0\nGET \0/\r\n\r\n"),
    *(b"\xfe\nGET \xfe/\n\n\n\n", b"\n\nGET " + b"/ \n\n\n\n", b"\0\1" * 600),
)
# Huffman codes of HPACK, for names that are compared after decoding.
_HUFFMAN: Final = {"e": "00101", "v": "1110111", "i": "00110", "l": "101000", ".": "010111", "t": "01001", "s": "01000"}


def tls(random: Random) -> list[Step]:
    """Return a ClientHello, then perhaps a request in plain text."""
    name = random.choice(
        (GOOD, EVIL, GOOD.upper(), GOOD + b".", GOOD + b"\0" + EVIL, b"", b"203.0.113.66", GOOD + b" ")
    )
    parts = [sni(name)]
    if random.random() < 0.3:
        parts.append(random.choice((sni(EVIL), sni(GOOD), extension(0xFE0D, bytes(8)), extension(43, b"\x02\x03\x04"))))
    if random.random() < 0.2:
        parts = [
            random.choice(
                (sni(GOOD, EVIL), sni(EVIL, GOOD), sni(EVIL, kind=1), extension(0, b""), extension(0, b"\0\0"))
            )
        ]
    random.shuffle(parts)
    data = hello(*parts)
    if random.random() < 0.3:
        data = records(data[5:], random.choice((1, 4, 5, 40)))
    if random.random() < 0.2:
        data = SSL_REQUEST + data
    steps: list[Step] = [data]
    if random.random() < 0.3:
        steps += [None, random.choice((BAD_GET, hello(sni(EVIL)), b"\x15\x03\x03\0\x02\x02\x28"))]
    return steps


def _huffman(text: bytes) -> bytes:
    bits = "".join(_HUFFMAN[letter] for letter in text.decode())
    bits += "1" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8)


def _fields(random: Random, host: bytes) -> bytes:
    """Return a header block of a request with oddities."""
    lines = [field(b":method", random.choice((b"GET", b"GET", b"POST", b"CONNECT", b"get")))]
    lines += [field(b":scheme", random.choice((b"http", b"http", b"https", b"ftp")))]
    lines += [
        field(b":path", random.choice((b"/", b"/", b"http://" + EVIL + b"/", b"//" + EVIL, b"*", b"", b"/\0", b"x")))
    ]
    name = random.choice((b":authority",) * 6 + (b"host", b"Host", b":Authority", b":host"))
    value = random.choice(
        (host,) * 6 + (host + b":80", GOOD + b"@" + EVIL, GOOD + b"\0" + EVIL, GOOD + b"," + EVIL, b"")
    )
    lines += [field(name, value)]
    if random.random() < 0.3:
        other = random.choice(
            (b":authority", b"host", b"Host", b"x-forwarded-host", b"connection", b"transfer-encoding")
        )
        lines.insert(random.randrange(len(lines) + 1), field(other, random.choice((EVIL, GOOD, b"chunked", b"close"))))
    if random.random() < 0.15:  # an index of the static table, and a Huffman-coded name
        code = _huffman(b"evil.test")
        lines.append(random.choice((b"\x01", b"\x41", b"\x11")) + bytes([0x80 | len(code)]) + code)
    if random.random() < 0.15:  # a field that is stored in the dynamic table, and then used by its index
        stored = random.choice((EVIL, GOOD))
        lines.append(b"\x41" + bytes([len(stored)]) + stored + random.choice((b"\xbe", b"\xbf", b"\x81", b"\x20")))
    if random.random() < 0.1:
        lines.insert(0, random.choice((b"\x20", b"\x3f\xe1\x1f", b"\x82", b"\x86", b"\x84", b"\x81", b"\x80")))
    return b"".join(lines)


def http2(random: Random) -> list[Step]:
    """Return a client of HTTP/2 with prior knowledge."""
    steps: list[Step] = [PREFACE + frame(4, 0, 0, random.choice(_SETTINGS))]
    stream, block = 1, b""
    for _ in range(random.choice((1, 1, 2, 3))):
        block = _fields(random, EVIL if random.random() < 0.15 else GOOD)
        cut = random.randrange(len(block)) if random.random() < 0.2 else len(block)
        flags = random.choice((5, 5, 5, 4, 0x25, 0xD)) & (0xFF if cut == len(block) else 0xFB)
        payload = block[:cut]
        if flags & 0x20:
            payload = b"\0\0\0\0\x10" + payload
        if flags & 8:
            payload = b"\x03" + payload + b"\0\0\0"
        out = frame(1, flags, stream, payload)
        if cut < len(block):
            out += frame(9, 4, stream if random.random() < 0.9 else stream + 2, block[cut:])
        if random.random() < 0.2:
            out += random.choice(
                (frame(0, 1, stream, GET), frame(6, 0, 0, bytes(8)), frame(3, 0, stream, bytes(4)), frame(4, 1, 0, b""))
            )
        steps.append(out)
        if random.random() < 0.2:
            steps.append(None)
        stream += random.choice((2, 2, 2, 0, 1))
    if random.random() < 0.2:
        steps.append(random.choice((BAD_GET, frame(5, 4, 1, b"\0\0\0\x02" + block), frame(0xEE, 0, 0, BAD_GET))))
    return steps
