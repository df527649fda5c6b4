"""The TLS ClientHello parser."""

from __future__ import annotations

import ssl
import struct
from typing import Final

import pytest

from tests.fuzz.fuzz_client_hello import pieces
from tests.fuzz.tls import body, extension, hello, message, records, sni
from x07_sandbox.network.protocols import HELLO_MAX, ClientHello, HelloReader, InspectionError

GOOD: Final = body(sni(b"a.example"))
PADDING: Final = 21


def real_hello(name: str | None, *, most: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> bytes:
    """The first bytes of this Python's TLS client."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.maximum_version = most
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    connection = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        connection.do_handshake()
    return outgoing.read()


def read(data: bytes, size: int = 1 << 20) -> ClientHello | None:
    """Feed the bytes to a reader in pieces of *size* until it returns the hello."""
    reader = HelloReader()
    for piece in pieces(data, size):
        if (found := reader.feed(piece)) is not None:
            return found
    return None


def rule_of(data: bytes, size: int = 1 << 20) -> str:
    """The rule that refuses the bytes, or ""."""
    try:
        read(data, size)
    except InspectionError as exc:
        return exc.rule
    return ""


@pytest.mark.parametrize("most", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("name", ["a.example", "A.Example", "xn--fa-hia.example", None])
def test_real_hellos_are_read(name: str | None, most: ssl.TLSVersion) -> None:
    """The server name in a real ClientHello is found."""
    found = read(real_hello(name, most=most))
    assert found == ClientHello(None if name is None else name.encode())


@pytest.mark.parametrize("record", [1, 2, 3, 7, 100, 1 << 14])
@pytest.mark.parametrize("size", [1, 5, 4096])
def test_a_split_hello_is_judged_like_a_whole_one(record: int, size: int) -> None:
    """A ClientHello split over records and reads is treated like a whole one (attack 51)."""
    assert read(records(real_hello("a.example")[5:], record), size) == ClientHello(b"a.example")
    assert rule_of(records(message(body(sni(b"a.example", b"b.example"))), record), size) == "tls:two-names"


@pytest.mark.parametrize("end", range(len(hello(sni(b"a.example")))))
def test_part_of_a_hello_is_no_verdict(end: int) -> None:
    """An incomplete ClientHello gives no verdict."""
    assert read(hello(sni(b"a.example"))[:end]) is None


def test_a_hello_without_extensions_is_read() -> None:
    """A ClientHello without extensions has no name."""
    assert read(records(message(GOOD[: 34 + 1 + 4 + 2]))) == ClientHello(None)


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (b"SSH-2.0-OpenSSH\r\n", "tls:not-tls"),
        (b"GET / HTTP/1.1\r\n", "tls:not-tls"),
        (b"\x80\x2e\x01\x00\x02", "tls:not-tls"),  # the hello of SSL 2
        (b"\x16\x02\x00\x00\x01", "tls:not-tls"),
        (b"\x17\x03\x03\x00\x01x", "tls:not-tls"),
        (b"\x15\x03\x01\x00\x02\x01\x00", "tls:not-tls"),
        (b"\x16\x03\x01\x00\x00", "tls:malformed"),
        (b"\x16\x03\x01\x40\x01", "tls:malformed"),
        (records(message(GOOD, kind=2)), "tls:malformed"),
        (records(message(b"", kind=0)) + records(message(GOOD)), "tls:malformed"),
        (records(message(GOOD)[:20]) + records(b"\x01\x00", kind=21), "tls:malformed"),
        (records(message(GOOD)[:20]) + records(message(GOOD)[20:], kind=23), "tls:malformed"),
        (records(message(GOOD) + b"\x0b"), "tls:malformed"),
        (records(message(GOOD + b"\0")), "tls:malformed"),
        (records(message(GOOD[:-1])), "tls:malformed"),
        (records(message(b"\x02" + GOOD[1:])), "tls:malformed"),
        (records(message(body(session_id=bytes(33)))), "tls:malformed"),
        (records(message(body(ciphers=b""))), "tls:malformed"),
        (records(message(body(ciphers=b"\x13\x01\x13"))), "tls:malformed"),
        (records(message(b"")), "tls:malformed"),
        (hello(sni(b"a.example"), sni(b"a.example")), "tls:two-names"),
        (hello(sni(b"a.example", b"a.example")), "tls:two-names"),
        (hello(sni(b"a.example"), extension(43, b""), extension(43, b"")), "tls:malformed"),
        (hello(extension(0, b"")), "tls:malformed"),
        (hello(extension(0, b"\0\0")), "tls:malformed"),
        (hello(sni(b"a.example", kind=1)), "tls:malformed"),
        (hello(extension(0, sni(b"a.example")[4:] + b"\0")), "tls:malformed"),
        (hello(extension(0, struct.pack("!HBH", 12, 0, 10) + b"a.example")), "tls:malformed"),
    ],
)
@pytest.mark.parametrize("size", [1, 1 << 20])
def test_anything_but_one_hello_is_refused(data: bytes, rule: str, size: int) -> None:
    """Anything but exactly one ClientHello with at most one name is refused, however it is cut."""
    assert rule_of(data, size) == rule


def test_a_hello_has_a_limit() -> None:
    """A ClientHello is limited to 64 KiB, including its records."""
    most = HELLO_MAX - 4 * 5  # in four records
    room = most - len(message(body(sni(b"a.example"), extension(PADDING, b""))))
    largest = records(message(body(sni(b"a.example"), extension(PADDING, bytes(room)))))
    assert len(largest) == HELLO_MAX
    assert read(largest) == read(largest, 1000) == ClientHello(b"a.example")
    larger = records(message(body(sni(b"a.example"), extension(PADDING, bytes(room + 1)))))
    assert rule_of(larger) == rule_of(larger, 1000) == "tls:too-large"
    assert rule_of(records(b"\x01\x01\x00\x00")) == "tls:too-large"
    dribbled = records(b"\x01\x00\xff\xf0" + bytes(HELLO_MAX), 1)
    assert rule_of(dribbled, 999) == "tls:too-large"
