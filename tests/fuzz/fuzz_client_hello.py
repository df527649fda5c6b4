"""Fuzz target: the inspection of a connection's first bytes, on a TLS port or a port of any protocol.

An input is a byte of switches and the client's bytes:

    bit 7        1: the mode is "any"; 0: "tls"
    bit 6        1: the connection is for a literal address; 0: for NAME
    bits 0 to 5  N cuts the bytes into pieces of N + 1 bytes

Invariants:

* only bytes or InspectionError come out, and after an InspectionError always the same one;
* the verdict, the name and the forwarded bytes do not depend on the cut;
* forwarded and held bytes together are the received bytes, unless a request was rewritten;
* on a TLS port nothing passes before a ClientHello that names NAME;
* at most HELD_MAX bytes and one read are held.
"""

from __future__ import annotations

import struct
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from x07_sandbox.network.first_bytes import HELD_MAX, Inspector
from x07_sandbox.network.protocols import InspectionError

if TYPE_CHECKING:
    from x07_sandbox.network.first_bytes import Mode
    from x07_sandbox.network.hosts import Host

NAME: Final = "a.example"
ADDRESS: Final = IPv4Address("192.0.2.7")
DENIED: Final = "denied.example"
TLS_ANSWER: Final = b"\x16\x03\x03"


class Verdict(NamedTuple):
    """The verdict on some bytes. rule: "" if they passed."""

    forwarded: bytes
    rule: str
    reason: str
    inspected: Inspector


def extension(kind: int, data: bytes) -> bytes:
    """Return one extension of a ClientHello."""
    return struct.pack("!HH", kind, len(data)) + data


def sni(*names: bytes, kind: int = 0) -> bytes:
    """Return a server name extension with these names."""
    entries = b"".join(struct.pack("!BH", kind, len(name)) + name for name in names)
    return extension(0, struct.pack("!H", len(entries)) + entries)


def body(*extensions: bytes, session_id: bytes = b"", ciphers: bytes = b"\x13\x01") -> bytes:
    """Return a ClientHello without its header."""
    fixed = b"\x03\x03" + bytes(32) + bytes([len(session_id)]) + session_id
    joined = b"".join(extensions)
    return fixed + struct.pack("!H", len(ciphers)) + ciphers + b"\x01\x00" + struct.pack("!H", len(joined)) + joined


def records(message: bytes, size: int = 1 << 14, kind: int = 22) -> bytes:
    """Return *message* in TLS records of at most *size* bytes each."""
    pieces = [message[at : at + size] for at in range(0, len(message), size)]
    return b"".join(struct.pack("!BHH", kind, 0x0301, len(piece)) + piece for piece in pieces)


def message(content: bytes, kind: int = 1) -> bytes:
    """Return a handshake message."""
    return struct.pack("!I", kind << 24 | len(content)) + content


def hello(*extensions: bytes) -> bytes:
    """Return a ClientHello in one record."""
    return records(message(body(*extensions)))


def pieces(data: bytes, size: int) -> list[bytes]:
    """Return the bytes in pieces."""
    return [data[at : at + size] for at in range(0, len(data), size)]


def denied(name: str) -> str | None:
    """Return why a name is denied."""
    return "a rule says so" if name == DENIED else None


def run(mode: Mode, host: Host, parts: list[bytes], answer: bytes = TLS_ANSWER, port: int = 80) -> Verdict:
    """Feed the parts and their end to an inspector. The server answers the first message."""
    inspected = Inspector(mode, host, port, denied)
    out = b""
    try:
        for part in parts:
            out += inspected.from_client(part)
            assert inspected.held <= HELD_MAX + len(part)
            while inspected.decided and inspected.watches_server and answer:
                inspected.from_server(answer)
                out += inspected.from_client(b"")
        inspected.client_eof()
        out += inspected.from_client(b"")
    except InspectionError as exc:
        assert not inspected.transparent
        check_sticky(inspected, exc)
        return Verdict(out, exc.rule, exc.reason, inspected)
    return Verdict(out, "", "", inspected)


def check_sticky(inspected: Inspector, error: InspectionError) -> None:
    """Check that after an error every call raises it again."""
    assert error.reason.isascii()
    assert error.reason.isprintable()
    for call in (lambda: inspected.from_client(b"x"), lambda: inspected.from_server(b"x"), inspected.client_eof):
        again: InspectionError | None = None
        try:
            call()
        except InspectionError as exc:
            again = exc
        assert again is error, "the inspector came back to life"


def one_input(data: bytes) -> None:
    """Check one input. Raises AssertionError, or any exception that the code under test must not raise."""
    if not data:
        return
    mode: Literal["tls", "any"] = "any" if data[0] & 0x80 else "tls"
    host = ADDRESS if data[0] & 0x40 else NAME
    stream = data[1:]
    cut = run(mode, host, pieces(stream, (data[0] & 0x3F) + 1))
    whole = run(mode, host, [stream])
    assert (cut.rule, cut.reason) == (whole.rule, whole.reason)
    assert cut.inspected.tls_name == whole.inspected.tls_name
    assert cut.forwarded.startswith(whole.forwarded) or b"HTTP/" in stream.upper()
    assert whole.rule or cut.forwarded == whole.forwarded == stream or b"HTTP/" in stream.upper()
    if mode == "tls" and whole.forwarded:
        assert whole.inspected.tls_name == NAME or host == ADDRESS
        assert whole.inspected.tls_name != DENIED
    if whole.inspected.transparent:
        assert cut.forwarded == whole.forwarded == stream
