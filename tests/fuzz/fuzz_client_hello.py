"""What the inspection of first bytes keeps to, whatever a client sends to a TLS port or to a port of any protocol.

An input is a byte of switches and the client's bytes:

    bit 7        1: the mode is "any"; 0: "tls"
    bit 6        1: the connection is for a literal address; 0: for NAME
    bits 0 to 5  N cuts the bytes into pieces of N + 1 bytes

What must hold:

* only bytes or InspectionError come out, and after an InspectionError the same one again;
* the verdict, the name and the forwarded bytes do not depend on the cut;
* what is forwarded and what is held are together what was received, unless a request was rewritten;
* on a TLS port nothing passes before a ClientHello that names NAME has been seen;
* no more than 64 KiB and one read are held.
"""

from __future__ import annotations

import struct
from typing import Final, Literal, NamedTuple

from x07_sandbox.network.first_bytes import InspectionError, Inspector

NAME: Final = "a.example"
DENIED: Final = "denied.example"
HELD_MAX: Final = 64 * 1024


class Verdict(NamedTuple):
    """What became of some bytes. rule: "" if they passed."""

    forwarded: bytes
    rule: str
    reason: str
    inspected: Inspector


def extension(kind: int, data: bytes) -> bytes:
    """One extension of a ClientHello."""
    return struct.pack("!HH", kind, len(data)) + data


def sni(*names: bytes, kind: int = 0) -> bytes:
    """A server name extension with these names."""
    entries = b"".join(struct.pack("!BH", kind, len(name)) + name for name in names)
    return extension(0, struct.pack("!H", len(entries)) + entries)


def body(*extensions: bytes, session_id: bytes = b"", ciphers: bytes = b"\x13\x01") -> bytes:
    """A ClientHello without its header."""
    fixed = b"\x03\x03" + bytes(32) + bytes([len(session_id)]) + session_id
    joined = b"".join(extensions)
    return fixed + struct.pack("!H", len(ciphers)) + ciphers + b"\x01\x00" + struct.pack("!H", len(joined)) + joined


def records(message: bytes, size: int = 1 << 14, kind: int = 22) -> bytes:
    """TLS records of at most *size* bytes each that hold *message*."""
    pieces = [message[at : at + size] for at in range(0, len(message), size)]
    return b"".join(struct.pack("!BHH", kind, 0x0301, len(piece)) + piece for piece in pieces)


def message(content: bytes, kind: int = 1) -> bytes:
    """A handshake message."""
    return struct.pack("!I", kind << 24 | len(content)) + content


def hello(*extensions: bytes) -> bytes:
    """A ClientHello in one record."""
    return records(message(body(*extensions)))


def pieces(data: bytes, size: int) -> list[bytes]:
    """The bytes, cut."""
    return [data[at : at + size] for at in range(0, len(data), size)]


def denied(name: str) -> str | None:
    """Why a name is denied."""
    return "a rule says so" if name == DENIED else None


def run(mode: Literal["tls", "http", "any"], name: str | None, parts: list[bytes]) -> Verdict:
    """Give the parts and their end to an inspector whose far end stays silent."""
    inspected = Inspector(mode, name, denied)
    out = b""
    try:
        for part in parts:
            out += inspected.from_client(part)
            assert inspected.held <= HELD_MAX + len(part)
        inspected.client_eof()
        out += inspected.from_client(b"")
    except InspectionError as exc:
        assert not inspected.transparent
        check_sticky(inspected, exc)
        return Verdict(out, exc.rule, exc.reason, inspected)
    return Verdict(out, "", "", inspected)


def check_sticky(inspected: Inspector, error: InspectionError) -> None:
    """After an error every call raises it again."""
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
    """Check one input. Raises AssertionError, or whatever it was that should never have been raised."""
    if not data:
        return
    mode: Literal["tls", "any"] = "any" if data[0] & 0x80 else "tls"
    name = None if data[0] & 0x40 else NAME
    stream = data[1:]
    cut = run(mode, name, pieces(stream, (data[0] & 0x3F) + 1))
    whole = run(mode, name, [stream])
    assert (cut.rule, cut.reason) == (whole.rule, whole.reason)
    assert cut.inspected.tls_name == whole.inspected.tls_name
    assert cut.forwarded.startswith(whole.forwarded) or b"HTTP/" in stream.upper()
    assert whole.rule or cut.forwarded == whole.forwarded == stream or b"HTTP/" in stream.upper()
    if mode == "tls" and whole.forwarded:
        assert whole.inspected.tls_name == NAME or name is None
        assert whole.inspected.tls_name != DENIED
    if whole.inspected.transparent:
        assert cut.forwarded == whole.forwarded == stream
