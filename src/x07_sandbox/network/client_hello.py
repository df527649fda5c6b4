"""Parser for a TLS ClientHello in hostile bytes.

Only the server name (SNI) is extracted. Every other field must be well-formed up to the last byte, so that no other
parser can find another name in the same bytes.
"""

import struct
from typing import Final, NamedTuple, NoReturn

from x07_sandbox.network.protocols import InspectionError

HELLO_MAX: Final = 64 * 1024  # bytes, record headers included

_HANDSHAKE: Final = 22
_CLIENT_HELLO: Final = 1
_MAJOR: Final = 3  # of SSL 3.0 and of every TLS version
_RECORD: Final = struct.Struct("!BBBH")
_RECORD_MAX: Final = 1 << 14
_MESSAGE_HEADER: Final = 4
_RANDOM: Final = 32
_SESSION_ID_MAX: Final = 32
_SERVER_NAME: Final = 0
_HOST_NAME: Final = 0


class ClientHello(NamedTuple):
    """A well-formed ClientHello. server_name: as sent; None without SNI."""

    server_name: bytes | None


class HelloReader:
    """Collects a ClientHello from any number of reads and TLS records.

    held: all bytes received. size: the bytes of the records read so far; once the hello is complete, its size.
    """

    def __init__(self) -> None:
        self.held = bytearray()  # with record headers; below HELLO_MAX while incomplete
        self.size = 0
        self._message = bytearray()

    def feed(self, data: bytes) -> ClientHello | None:
        """Add bytes, and return the hello once it is complete. Raises InspectionError if it is not valid."""
        self.held += data
        while self._take_record():
            if (hello := self._whole()) is not None:
                return hello
        return None

    def _take_record(self) -> bool:
        """Move the next record's content to the message, and return whether the record was complete."""
        header = self.held[self.size : self.size + _RECORD.size]
        if header[:1] not in (b"", bytes([_HANDSHAKE])) or header[1:2] not in (b"", bytes([_MAJOR])):
            if not self.size:
                raise InspectionError("tls:not-tls", "the first bytes are not a TLS handshake")
            raise InspectionError("tls:malformed", "a TLS record of another type interrupts the ClientHello")
        if len(header) < _RECORD.size:
            return False
        _, _, _, length = _RECORD.unpack(header)
        if not 0 < length <= _RECORD_MAX:
            raise InspectionError("tls:malformed", "a TLS record has an invalid length")
        start = self.size + _RECORD.size
        if start + length > HELLO_MAX:
            raise InspectionError("tls:too-large", f"the ClientHello has more than {HELLO_MAX} bytes")
        if len(self.held) < start + length:
            return False
        self._message += self.held[start : start + length]
        self.size = start + length
        return True

    def _whole(self) -> ClientHello | None:
        if self._message[0] != _CLIENT_HELLO:
            raise InspectionError("tls:malformed", "the first TLS message is not a ClientHello")
        if len(self._message) < _MESSAGE_HEADER:
            return None
        size = _MESSAGE_HEADER + int.from_bytes(self._message[1:_MESSAGE_HEADER])
        if size > HELLO_MAX:
            raise InspectionError("tls:too-large", f"the ClientHello has more than {HELLO_MAX} bytes")
        if len(self._message) > size:
            raise InspectionError("tls:malformed", "a TLS record contains bytes after the ClientHello")
        return parse(bytes(self._message[_MESSAGE_HEADER:])) if len(self._message) == size else None


def parse(body: bytes) -> ClientHello:
    """Parse a ClientHello without its four-byte header. Raises InspectionError if it is not well-formed."""
    hello = _Cursor(body)
    if hello.number(1) != _MAJOR:
        _malformed("has an unknown version")
    hello.take(1 + _RANDOM)
    session_id, ciphers, compressions = hello.block(1), hello.block(2), hello.block(1)
    if len(session_id) > _SESSION_ID_MAX or not ciphers or len(ciphers) % 2 or not compressions:
        _malformed("has a field of invalid length")
    extensions = _extensions(hello.block(2)) if hello.left else {}
    hello.end()
    name = extensions.get(_SERVER_NAME)
    return ClientHello(None if name is None else _host_name(name))


def _extensions(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    cursor = _Cursor(data)
    while cursor.left:
        kind = cursor.number(2)
        if kind in found:
            if kind == _SERVER_NAME:
                raise InspectionError("tls:two-names", "the ClientHello has two server name extensions")
            _malformed("has a duplicate extension")
        found[kind] = cursor.block(2)
    return found


def _host_name(data: bytes) -> bytes:
    extension = _Cursor(data)
    names = _Cursor(extension.block(2))
    extension.end()
    if names.number(1) != _HOST_NAME:
        _malformed("has a server name of unknown type")
    name = names.block(2)
    if names.left:
        raise InspectionError("tls:two-names", "the ClientHello has more than one server name")
    return name


class _Cursor:
    """Reads fields from bytes. Raises InspectionError for a read past their end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, size: int) -> bytes:
        if size > self.left:
            _malformed("has a field that exceeds its end")
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size))

    def block(self, length_size: int) -> bytes:
        """Read a length-prefixed field."""
        return self.take(self.number(length_size))

    def end(self) -> None:
        if self.left:
            _malformed("has bytes after its last field")


def _malformed(what: str) -> NoReturn:
    raise InspectionError("tls:malformed", f"the ClientHello {what}")
