"""Table of the protocols, other than TLS and HTTP, that the gate recognises on ports of any protocol.

Each row states the bytes that the client must send first, and the server's bytes that prove the protocol. A row may
release only a first message that no HTTP server could take for a request to another host. The server's bytes are a
proof, because an HTTP server does not speak first, and does not answer such a message in this form.
"""

import re
from collections.abc import Callable, Mapping
from typing import Final, Literal, NamedTuple


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
