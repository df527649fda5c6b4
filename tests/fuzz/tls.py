"""The bytes of a ClientHello, well-formed or not."""

from __future__ import annotations

import struct


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
