"""The protocols, other than HTTP, that the gate recognises: a table of those on ports of any protocol, and TLS.

Each row states the bytes that the client must send first, and the server's bytes that prove the protocol. A row may
release only a first message that no HTTP server could take for a request to another host. The server's bytes are a
proof, because an HTTP server does not speak first, and does not answer such a message in this form.

Also a parser for a TLS ClientHello. Only the server name (SNI) is extracted. Every other field must be well-formed up
to the last byte, so that no other parser can find another name in the same bytes.
"""

import re
import struct
from collections.abc import Callable, Mapping
from typing import Final, Literal, NamedTuple, NoReturn


class InspectionError(Exception):
    """The client's bytes are not allowed, and the connection must be closed.

    rule: a stable id, such as ``tls:no-sni``. reason: a clause with the client's text escaped and truncated.
    name: the name that the client sent, in normal form if it is valid, else escaped; "" if the client sent no name.
    """

    def __init__(self, rule: str, reason: str, name: str = "") -> None:
        super().__init__(rule, reason, name)
        self.rule = rule
        self.reason = reason
        self.name = name


ANSWER_MAX: Final = 512
"""Maximum bytes of a server's greeting or answer that are compared with the table."""

SSH_START: Final = b"SSH-"
_POSTGRES_HEADER: Final = 8
_POSTGRES_MAX: Final = 8192
_POSTGRES_KEY_MAX: Final = 4 + 256
_POSTGRES_CANCEL: Final = 80_877_102
_POSTGRES_VERSIONS: Final = range(196_608, 196_618)  # 3.0 and later
# Without control characters, so that the message holds no line of text.
_POSTGRES_OPTIONS: Final = re.compile(rb"(?:[^\x00-\x1f\x7f]+\x00[^\x00-\x1f\x7f]*\x00)+\x00")
_REDIS_COUNT: Final = re.compile(rb"\*([1-9][0-9]?)\r\n")
# Without blanks, so that no argument is a request line.
_REDIS_ARGUMENT: Final = re.compile(rb"\$([1-9][0-9]{0,3})\r\n([\x21-\x7e\x80-\xff]+)\r\n")
# What may become a count or an argument.
_REDIS_OPEN: Final = re.compile(
    rb"(?:\*(?:[1-9][0-9]?\r?)?|\$(?:[1-9][0-9]{0,3}(?:\r(?:\n(?:[\x21-\x7e\x80-\xff]+\r?)?)?)?)?)?"
)
_REDIS_MAX: Final = 4096


class Greeted(NamedTuple):
    """A protocol whose server speaks first. client: the client's first bytes, found within *client_max* bytes."""

    name: str
    greeting: re.Pattern[bytes]
    client: re.Pattern[bytes]
    client_max: int


class Opening(NamedTuple):
    """A protocol whose client speaks first.

    start: the first bytes, which select the row. first_message: returns the size of the first message, or 0 if it is
    incomplete. proof: the server's answer, found within *proof_max* bytes. after: what the client must send after an
    answer; anything, if the answer is missing here.
    """

    name: str
    start: bytes
    first_message: Callable[[bytes], int]
    proof: re.Pattern[bytes]
    proof_max: int
    after: Mapping[bytes, Literal["tls", "any"]] = {}


def unknown(why: str) -> InspectionError:
    """Return the error for bytes of an unknown protocol."""
    return InspectionError("first-bytes:unknown", why)


def _postgres_request(_data: bytes) -> int:
    return _POSTGRES_HEADER


def _postgres_start(data: bytes) -> int:
    """Return the size of a StartupMessage or CancelRequest (PostgreSQL documentation, "Message Formats")."""
    if len(data) < _POSTGRES_HEADER:
        return 0
    size, code = int.from_bytes(data[:4]), int.from_bytes(data[4:8])
    if not _POSTGRES_HEADER < size <= _POSTGRES_MAX:
        raise unknown("the first message is not a PostgreSQL message")
    if len(data) < size:
        return 0
    options = data[_POSTGRES_HEADER:size]
    if code != _POSTGRES_CANCEL and (code not in _POSTGRES_VERSIONS or not _POSTGRES_OPTIONS.fullmatch(options)):
        raise unknown("the first message is not a PostgreSQL start message without control characters")
    if code == _POSTGRES_CANCEL and (len(options) > _POSTGRES_KEY_MAX or b"\n" in options or b"\r" in options):
        raise unknown("the PostgreSQL cancel request is too long or contains a line break")
    return size


def _redis_command(data: bytes) -> int:
    """Return the size of the first command, an array of bulk strings (Redis serialization protocol specification)."""
    count = _REDIS_COUNT.match(data)
    at = count.end() if count else 0
    for _ in range(int(count[1]) if count else 1):
        argument = _REDIS_ARGUMENT.match(data, at)
        if argument is None and len(data) <= _REDIS_MAX and _REDIS_OPEN.fullmatch(data, at):
            return 0
        if argument is None or int(argument[1]) != len(argument[2]):
            raise unknown("the first message is not a Redis command of printable arguments without blanks")
        at = argument.end()
    return at


SERVER_FIRST: Final = (
    Greeted(
        "SSH",
        re.compile(rb"SSH-(?:2\.0|1\.99)-[\x20-\x7e]{1,242}\r?\n"),  # RFC 4253, 4.2
        re.compile(rb"SSH-2\.0-[\x20-\x7e]{1,245}\r?\n"),
        255,
    ),
    Greeted(
        "SMTP or FTP",
        re.compile(rb"220[ -][^\n]*\n"),  # RFC 5321 and RFC 959
        re.compile(
            rb"(?:EHLO|HELO|LHLO|STARTTLS|AUTH|USER|FEAT|SYST|OPTS|HOST|CLNT|NOOP|RSET|HELP|QUIT)"
            rb"(?: [\x20-\x7e]*)?\r?\n",
            re.IGNORECASE,
        ),
        512,
    ),
    Greeted(
        "MySQL",
        re.compile(rb"[\x20-\xff]\x00\x00\x00\x0a[\x20-\x7e]{1,60}\x00"),  # Protocol::HandshakeV10
        re.compile(rb".{3}\x01", re.DOTALL),
        4,
    ),
)
_POSTGRES: Final = "PostgreSQL"
_SSL_REQUEST: Final = bytes.fromhex("00000008 04d2162f")
_GSS_REQUEST: Final = bytes.fromhex("00000008 04d21630")
CLIENT_FIRST: Final = (
    Opening(_POSTGRES, _SSL_REQUEST, _postgres_request, re.compile(rb"[SN]"), 1, {b"S": "tls", b"N": "any"}),
    # Another answer than N starts an encryption that the gate does not know.
    Opening(_POSTGRES, _GSS_REQUEST, _postgres_request, re.compile(rb"N"), 1, {b"N": "any"}),
    Opening(_POSTGRES, b"\x00", _postgres_start, re.compile(rb"[REv]\x00\x00[\x00-\x20].", re.DOTALL), 5),
    Opening("Redis", b"*", _redis_command, re.compile(rb"[-+:_,#($*%~=>|][^\r\n]*\r\n"), ANSWER_MAX),
)
NAMES: Final = ", ".join(dict.fromkeys(row.name for row in (*SERVER_FIRST, *CLIENT_FIRST)))


# TLS

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
        return parse_hello(bytes(self._message[_MESSAGE_HEADER:])) if len(self._message) == size else None


def parse_hello(body: bytes) -> ClientHello:
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
