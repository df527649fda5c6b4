"""The server name that OpenSSL reads in a connection's bytes: the evidence for what passes as TLS."""

from __future__ import annotations

import contextlib
import ssl
from typing import Final

from tests.fuzz.differential.evidence import Taken

_RECORD: Final = b"\x16\x03"
_POSTGRES: Final = (bytes.fromhex("00000008 04d2162f"), bytes.fromhex("00000008 04d21630"))


def openssl(data: bytes) -> Taken | None:
    """Return the server name that OpenSSL takes from a ClientHello at the start of the bytes; None if there is none.

    PostgreSQL's requests for encryption may precede it.
    """
    while data[:8] in _POSTGRES:
        data = data[8:]
    return _read(data) if data.startswith(_RECORD) else None


def _read(data: bytes) -> Taken | None:
    names: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.sni_callback = lambda _connection, name, _context: names.append(name)
    incoming = ssl.MemoryBIO()
    connection = context.wrap_bio(incoming, ssl.MemoryBIO(), server_side=True)
    incoming.write(data)
    with contextlib.suppress(ssl.SSLError, UnicodeError):
        connection.do_handshake()
    if not names:
        return None
    return Taken("openssl", (names[0],) if names[0] is not None else (), "TLS")
