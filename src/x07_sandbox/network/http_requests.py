"""Inspection of a client's HTTP requests, of version 1.x, and of version 2 without TLS.

Every HTTP/1.x request is parsed, and re-serialized in one strict form.

The client's own bytes are never forwarded, so the server cannot interpret a request differently. h11 parses. Before
that, this module rejects what h11 tolerates: bare line feeds, folded lines, control characters, ambiguous body lengths,
CONNECT, HTTP/2, and an absolute target that differs from Host.

Some servers do not read the body of a request that they refuse, and would take it for the next request. Therefore a
request with a body, or with Expect, gets ``Connection: close``, and nothing may follow it.

Upgrades are removed, except a WebSocket handshake. After the server has accepted it (status 101), bytes are forwarded
unchanged.

HTTP/2 frames (RFC 9113, prior knowledge) are forwarded unchanged, each after its check. Every request must be for the
host of the connection. Behind the client's preface and first SETTINGS frame, all bytes are held until the server's
first frame proves that it speaks HTTP/2: an HTTP/1 server could find a request line in them. A proxy may translate a
request to HTTP/1. Therefore fields that could end a line or change the length of a body there are refused too (8.2 and
10.3).
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NoReturn

import h11

from x07_sandbox.errors import UsageError
from x07_sandbox.network.hosts import Host, parse_guest_host
from x07_sandbox.network.protocols import InspectionError
from x07_sandbox.policy.hosts import PORT_LAST

if TYPE_CHECKING:
    from hpack.struct import HeaderTuple

HEAD_MAX: Final = 64 * 1024
"""Maximum bytes of a request's head, of chunk headers and trailers, and of data after an unanswered handshake."""

_PIECE: Final = 16 * 1024  # limits the copying for pipelined requests
_TEXT_MAX: Final = 253
WORD: Final = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_WORD_START: Final = re.compile(WORD)
_REQUEST_LINE: Final = re.compile(rb"(%b) ([\x21-\x7e]+) HTTP/([0-9]\.[0-9])\r\n" % WORD)
_FIELD: Final = re.compile(rb"%b:[^\x00-\x08\x0a-\x1f\x7f]*\r\n" % WORD)
_HOST: Final = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(?::([1-9][0-9]{0,4}))?")
_PORT_DEFAULT: Final = 80
_ABSOLUTE: Final = re.compile(rb"http://([^/?#]*)([^#]*)", re.IGNORECASE)
_STATUS_SIZE: Final = len(b"HTTP/1.1 101 ")
_SWITCHED: Final = re.compile(rb"HTTP/1\.1 101[ \r\n]")
_LENGTH: Final = re.compile(rb"[0-9]{1,15}")  # the range that every server can count
# Not allowed in a trailer, nor with "_" for "-", which some servers take for the same: they control routing or framing.
_HEAD_ONLY: Final = frozenset(
    {b"connection", b"content-length", b"expect", b"host", b"te", b"transfer-encoding", b"upgrade"}
)


def escaped(text: bytes | str) -> str:
    """Return a client's text for a message: quoted ASCII on one line, at most 253 characters."""
    shown = ascii(text.decode("latin-1") if isinstance(text, bytes) else text)
    return shown if len(shown) <= _TEXT_MAX else shown[: _TEXT_MAX - 3] + "..."


class RequestStream:
    """The client's half of one HTTP/1.x connection to *port*. check_host: raises InspectionError for a denied host.

    decided: whether the first request's head was accepted. watches_server: whether `server` needs the server's bytes.
    """

    def __init__(self, check_host: Callable[[Host], None], port: int) -> None:
        self._host_check = check_host
        self._port = port
        self._pending = bytearray()
        self._line_at = 0
        self._searched = 0
        self._body: h11.Connection | None = None
        self._chunked = False
        self._handshake = False
        self._last = False
        self._answer = b""
        self._raw = False
        self.decided = False
        self.watches_server = False

    @property
    def held(self) -> int:
        """Number of received bytes that are not forwarded yet."""
        return len(self._pending) + (len(self._body.trailing_data[0]) if self._body else 0)

    @property
    def transparent(self) -> bool:
        """Whether the connection no longer uses HTTP, and no bytes are held."""
        return self._raw and not self._pending

    def feed(self, data: bytes) -> bytes:
        """Add bytes from the client, and return the bytes to forward. Raises InspectionError."""
        out = bytearray()
        for at in range(0, len(data) or 1, _PIECE):
            self._pending += data[at : at + _PIECE]
            self._advance(out)
        return bytes(out)

    def server(self, data: bytes) -> None:
        """Add the server's bytes while watches_server is true. feed(b"") then returns the bytes to forward."""
        if not self.watches_server:
            return
        self._answer += data[: _STATUS_SIZE - len(self._answer)]
        if len(self._answer) == _STATUS_SIZE:
            self.watches_server = False
            self._raw = _SWITCHED.fullmatch(self._answer) is not None

    def eof(self) -> None:
        """Raise InspectionError if the client stopped inside a request."""
        if not self._raw and (self._pending or self._body):
            _malformed("the connection ends inside a request")

    def _advance(self, out: bytearray) -> None:
        while self._pending:
            if self._raw:
                out += self._pending
                self._pending.clear()
            elif self.watches_server:
                if len(self._pending) > HEAD_MAX:
                    raise InspectionError("http:too-large", "too much data follows an unanswered WebSocket handshake")
                return
            elif self._body is not None:
                self._body.receive_data(bytes(self._pending))
                self._pending.clear()
                self._take_body(self._body, out)
            elif self._last:
                _malformed("bytes follow a request with a body, which must be the last of its connection")
            elif (head := self._take_head()) is not None:
                self._take_request(head, out)
            else:
                return

    def _take_head(self) -> bytes | None:
        """Remove and return the next request head once it is complete. Each line is checked when it arrives."""
        if not _WORD_START.match(self._pending, 0, 1):
            _malformed("the first bytes are not an HTTP/1 request")
        while (end := self._pending.find(b"\n", self._searched, HEAD_MAX) + 1) > 0:
            line, first = bytes(self._pending[self._line_at : end]), self._line_at == 0
            self._line_at = self._searched = end
            if first:
                _check_request_line(line)
            elif line != b"\r\n":
                _check_field(line)
            else:
                head = bytes(self._pending[:end])
                del self._pending[:end]
                self._line_at = self._searched = 0
                return head
        self._searched = len(self._pending)
        if len(self._pending) >= HEAD_MAX:
            raise InspectionError("http:too-large", f"the head of a request has more than {HEAD_MAX} bytes")
        return None

    def _take_request(self, head: bytes, out: bytearray) -> None:
        _check_counts(head)
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_MAX)
        connection.receive_data(head)
        request = _next_event(connection)
        if not isinstance(request, h11.Request):
            _malformed("the request is not complete")
        fields = dict(request.headers)
        target = self._check_host(request, fields[b"host"])
        self._chunked = b"transfer-encoding" in fields
        length = parse_length(fields.get(b"content-length", b"0"))
        self._last = self._chunked or length > 0 or b"expect" in fields
        self._handshake = not self.decided and not self._last and _is_handshake(request)
        self.decided = True
        out += b"%b %b HTTP/%b\r\n" % (request.method, target, request.http_version)
        for raw, (name, value) in zip(request.headers.raw_items(), request.headers, strict=True):
            if (written := self._rewritten(name, value)) is not None:
                out += b"%b: %b\r\n" % (raw[0], written)
        out += b"Connection: close\r\n\r\n" if self._last else b"\r\n"
        self._body = connection
        self._take_body(connection, out)

    def _take_body(self, connection: h11.Connection, out: bytearray) -> None:
        while (event := _next_event(connection)) is not h11.NEED_DATA:
            if isinstance(event, h11.Data):
                out += b"%x\r\n%b\r\n" % (len(event.data), event.data) if self._chunked else event.data
            elif isinstance(event, h11.EndOfMessage):
                out += _end(event) if self._chunked else b""
                self._pending[:0] = connection.trailing_data[0]
                self._body = None
                self.watches_server = self._handshake
                return
            else:
                _malformed("the request's body is not complete")

    def _rewritten(self, name: bytes, value: bytes) -> bytes | None:
        """Return the value to forward for a header, or None to remove the header."""
        if name == b"connection":
            known = {b"close", b"keep-alive", *([b"upgrade"] if self._handshake else [])}
            tokens = [token for token in (token.strip() for token in value.split(b",")) if token.lower() in known]
            return None if self._last else b", ".join(tokens) or None
        if name == b"host" and self._port != _PORT_DEFAULT and (host := _HOST.fullmatch(value)) and not host[2]:
            return b"%b:%d" % (value, self._port)  # without a port, it would mean port 80
        if name == b"content-length":
            return b"%d" % parse_length(value)
        if name == b"http2-settings" or (name == b"upgrade" and not self._handshake):
            return None
        return value

    def _check_host(self, request: h11.Request, text: bytes) -> bytes:
        """Check the request's host. Return the request's target without scheme and host."""
        if not text:
            raise InspectionError("http:no-host", "the request has an empty Host")
        host = check_authority(text, self._port)
        target = request.target
        if absolute := _ABSOLUTE.fullmatch(target):
            authority, path = absolute.groups()
            if check_authority(authority, self._port) != host:
                why = f"the request's target has the host {escaped(authority)}, but its Host header is {escaped(text)}"
                raise InspectionError("http:other-host", why, str(host))
            target = path if path.startswith(b"/") else b"/" + path
        elif not target.startswith(b"/") and (target, request.method) != (b"*", b"OPTIONS"):
            _malformed(f"the request has the target {escaped(target)}, which is neither a path nor an http:// URL")
        self._host_check(host)
        return target


def _check_request_line(line: bytes) -> None:
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        _malformed("the first line is not an HTTP/1 request line")
    method, _, version = match.groups()
    if method == b"PRI" or version.startswith(b"2"):
        raise InspectionError("http:upgrade", "HTTP/2 without TLS is not supported on this port")
    if version not in {b"1.0", b"1.1"}:
        _malformed(f"HTTP/{version.decode()} is not supported")
    if method.upper() == b"CONNECT":
        raise InspectionError("http:connect", "the request asks for a tunnel (CONNECT)")


def _check_field(line: bytes) -> None:
    if not line.endswith(b"\r\n"):
        _malformed("a line of the request ends in LF without CR")
    if line.startswith((b" ", b"\t")):
        _malformed("a header line of the request is folded")
    if not _FIELD.fullmatch(line):
        _malformed("a header line of the request is not NAME: VALUE")


def _check_counts(head: bytes) -> None:
    """Check for missing and duplicate headers. h11 would merge these, or report them without a rule id."""
    request_line, *lines = head[:-4].split(b"\r\n")
    names = [line.partition(b":")[0].lower() for line in lines]
    for name in names:
        if b"_" in name and name.replace(b"_", b"-") in _HEAD_ONLY:
            _malformed(f"the request has the header {escaped(name)}, which some servers read as another header")
    count = Counter(names)
    if count[b"host"] != 1:
        if count[b"host"]:
            _malformed("the request has more than one Host")
        raise InspectionError("http:no-host", "the request has no Host")
    lengths = count[b"transfer-encoding"] + count[b"content-length"]
    if lengths > 1 or (count[b"transfer-encoding"] and request_line.endswith(b"1.0")):
        raise InspectionError("http:ambiguous-length", "the length of the request's body is ambiguous")


def _is_handshake(request: h11.Request) -> bool:
    """Return whether a request without a body is a WebSocket handshake (RFC 6455, 4.1)."""
    upgrades = [value.lower() for name, value in request.headers if name == b"upgrade"]
    tokens = b",".join(value for name, value in request.headers if name == b"connection").lower().split(b",")
    upgraded = upgrades == [b"websocket"] and b"upgrade" in {token.strip() for token in tokens}
    return upgraded and request.method == b"GET" and request.http_version == b"1.1"


def parse_length(text: bytes) -> int:
    """Return the value of Content-Length. Raises InspectionError for a length that servers read differently."""
    if not _LENGTH.fullmatch(text):
        raise InspectionError("http:ambiguous-length", "the length of the request's body is not a number below 10^15")
    return int(text)


def check_authority(text: bytes, port: int, *, need_port: bool = False) -> Host:
    """Return the host in ``NAME`` or ``NAME:PORT``. Raises InspectionError for another port than the connection's.

    need_port: whether a missing port means port 80, because the text is forwarded as it is.
    """
    match = _HOST.fullmatch(text)
    if match is None or not 0 < int(match[2] or port) <= PORT_LAST:
        _malformed(f"the request has the host {escaped(text)}, which is not NAME or NAME:PORT")
    try:
        host = parse_guest_host(match[1])
    except UsageError:
        _malformed(f"the request has the host {escaped(text)}, which is neither a name nor an address")
    if (asked := int(match[2] or (_PORT_DEFAULT if need_port else port))) != port:
        why = f"the request asks for port {asked}, but the connection was opened for port {port}"
        raise InspectionError("http:other-host", why, str(host))
    return host


def _next_event(connection: h11.Connection) -> object:
    try:
        return connection.next_event()
    except h11.RemoteProtocolError as exc:
        if exc.error_status_hint == 431:  # noqa: PLR2004 - h11's status for a full buffer
            raise InspectionError("http:too-large", "a line of the request's body is too long") from None
        _malformed(f"the request is not well-formed: {escaped(str(exc))}")


def _end(event: h11.EndOfMessage) -> bytes:
    """Return the last chunk and the trailer of a chunked body."""
    lines = [b"%b: %b\r\n" % field for field in event.headers.raw_items()]
    for line, (name, _) in zip(lines, event.headers, strict=True):
        if name in _HEAD_ONLY or not _FIELD.fullmatch(line):
            _malformed(f"the request has {escaped(name)} in its trailer")
    return b"".join([b"0\r\n", *lines, b"\r\n"])


def _malformed(why: str) -> NoReturn:
    raise InspectionError("http:malformed", why) from None


# HTTP/2

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

_HEADER: Final = 9
_DATA, _HEADERS, _PRIORITY, _RESET, _SETTINGS, _PING, _GOAWAY, _WINDOW, _CONTINUATION = 0, 1, 2, 3, 4, 6, 7, 8, 9
_KINDS: Final = frozenset({_PRIORITY, _RESET, _SETTINGS, _PING, _GOAWAY, _WINDOW})
_END_STREAM, _END_HEADERS, _PADDED, _WITH_PRIORITY = 0x1, 0x4, 0x8, 0x20
_PRIORITY_SIZE: Final = 5
_FRAME_MAX: Final = 64 * 1024  # of frames other than DATA; also of all frames of one field block
_FIELDS_MAX: Final = 64 * 1024
_TABLE_MAX: Final = 64 * 1024
_BODIES_MAX: Final = 1024
_SETTING_SIZE: Final = 6
_SETTINGS_MAX: Final = 32 * _SETTING_SIZE
# High bytes of the identifiers of RFC 9113 and of gRPC (0xfe03). With them, the frame contains no line of text.
_SETTING_HIGH: Final = frozenset({0x00, 0xFE})
# gRPC's setting GRPC_ALLOW_TRUE_BINARY_METADATA: the server takes binary values, marked by a leading zero byte.
_BINARY: Final = bytes.fromhex("fe03 00000001")
_NAME: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")
_VALUE: Final = re.compile(rb"[^\x00-\x08\x0a-\x1f\x7f]*")
_PATH: Final = re.compile(rb"/[\x21-\x7e]*")
_PSEUDO: Final = (b":authority", b":method", b":path", b":scheme")
# They control one HTTP/1 connection, and are not allowed in HTTP/2. Nor are their names, and Content-Length, with "_".
_HOP: Final = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"})


class FrameStream:
    """The client's half of one HTTP/2 connection. The properties are those of `RequestStream`.

    answer: the server's first bytes so far. A server may send its SETTINGS frame before the client speaks.
    """

    transparent = False

    def __init__(self, check_host: Callable[[Host], None], port: int, answer: bytes) -> None:
        from hpack import Decoder

        self._check_host = check_host
        self._port = port
        self._decoder = Decoder(max_header_list_size=_FIELDS_MAX)
        self._decoder.max_allowed_table_size = _TABLE_MAX
        self._pending = bytearray()
        self._passing = 0  # bytes of the current DATA frame that are still to be forwarded
        self._last_stream = 0
        self._block = bytearray()  # frames of an incomplete field block
        self._fields = bytearray()
        self._block_flags = 0
        self._block_stream = 0
        self._bodies: dict[int, int] = {}  # bytes that remain of each body with a declared length, by stream
        self._answer = b""
        self._takes_binary = False  # whether the server is one of gRPC that takes binary values
        self.decided = False
        self.watches_server = True
        self.server(answer)

    @property
    def held(self) -> int:
        """Number of received bytes that are not forwarded yet."""
        return len(self._pending) + len(self._block)

    def feed(self, data: bytes) -> bytes:
        """Add bytes from the client, and return the bytes to forward. Raises InspectionError."""
        self._pending += data
        out = bytearray()
        if not self.decided:
            self._take_preface(out)
        if self.decided and not self.watches_server:
            while self._advance(out):
                pass
        return bytes(out)

    def server(self, data: bytes) -> None:
        """Add the server's bytes while watches_server is true. Raises InspectionError if they are not HTTP/2."""
        if not self.watches_server:
            return
        self._answer += data[: _HEADER + _SETTINGS_MAX - len(self._answer)]
        if len(self._answer) < _HEADER:
            return
        length, kind, flags, stream = _header(self._answer)
        if kind != _SETTINGS or flags or stream or length % _SETTING_SIZE or length > _SETTINGS_MAX:
            _malformed("the server does not speak HTTP/2")
        settings = self._answer[_HEADER : _HEADER + length]
        self.watches_server = len(settings) < length
        self._takes_binary = _BINARY in {settings[at : at + _SETTING_SIZE] for at in range(0, length, _SETTING_SIZE)}

    def eof(self) -> None:
        """Raise InspectionError if the client stopped inside a frame or a field block."""
        if not self.decided or self._passing or self._block or (self._pending and not self.watches_server):
            _malformed("the connection ends inside an HTTP/2 frame")

    def _take_preface(self, out: bytearray) -> None:
        """Forward the preface and the first SETTINGS frame."""
        start = len(PREFACE) + _HEADER
        if len(self._pending) < start:
            return
        length, kind, flags, stream = _header(self._pending[len(PREFACE) : start])
        if kind != _SETTINGS or flags or stream or length % _SETTING_SIZE or length > _SETTINGS_MAX:
            _malformed("the HTTP/2 preface is not followed by a SETTINGS frame")
        if len(self._pending) < start + length:
            return
        if not _SETTING_HIGH.issuperset(self._pending[start : start + length : _SETTING_SIZE]):
            _malformed("the first HTTP/2 SETTINGS frame has an unknown setting")
        self._forward(start + length, out)
        self.decided = True

    def _forward(self, size: int, out: bytearray) -> None:
        out += self._pending[:size]
        del self._pending[:size]

    def _advance(self, out: bytearray) -> bool:
        """Check and forward one frame, or a part of a DATA frame. Return whether there was one."""
        if self._passing:
            size = min(self._passing, len(self._pending))
            self._forward(size, out)
            self._passing -= size
            return size > 0
        if len(self._pending) < _HEADER:
            return False
        length, kind, flags, stream = _header(self._pending)
        if self._block and (kind, stream) != (_CONTINUATION, self._block_stream):
            _malformed("an HTTP/2 field block is interrupted")
        if kind == _DATA:
            return self._start_data(length, flags, stream)
        if length > _FRAME_MAX:
            raise InspectionError("http:too-large", f"an HTTP/2 frame has more than {_FRAME_MAX} bytes")
        if len(self._pending) < _HEADER + length:
            return False
        self._take_frame(_HEADER + length, kind, flags, stream, out)
        return True

    def _take_frame(self, size: int, kind: int, flags: int, stream: int, out: bytearray) -> None:
        """Check and forward a whole frame of *size* bytes."""
        payload = bytes(self._pending[_HEADER:size])
        if kind == _HEADERS:
            self._block_flags, self._block_stream = flags, stream
            self._take_block(_unpadded(payload, flags), flags, size, out)
        elif kind == _CONTINUATION and self._block:
            self._take_block(payload, flags, size, out)
        elif kind in _KINDS:
            if kind == _RESET:
                self._bodies.pop(stream, None)
            self._forward(size, out)
        else:
            _malformed(f"an HTTP/2 frame has the type {kind}")

    def _start_data(self, length: int, flags: int, stream: int) -> bool:
        """Check the length of a DATA frame, and start to forward it."""
        padding = 0
        if flags & _PADDED:
            if not length:
                _malformed("an HTTP/2 frame has no room for its padding")
            if len(self._pending) == _HEADER:
                return False
            padding = 1 + self._pending[_HEADER]
        self._count_body(stream, length - padding, flags)
        self._passing = _HEADER + length
        return True

    def _count_body(self, stream: int, size: int, flags: int) -> None:
        """Subtract *size* bytes from the declared length of a body."""
        left = self._bodies.get(stream)
        if size < 0 or (left is not None and (size > left or (flags & _END_STREAM and size != left))):
            raise InspectionError("http:ambiguous-length", "an HTTP/2 body does not have its declared length")
        if left is not None:
            self._bodies[stream] = left - size
        if flags & _END_STREAM:
            self._bodies.pop(stream, None)

    def _take_block(self, part: bytes, flags: int, size: int, out: bytearray) -> None:
        """Add a frame to the field block. Check and forward the block once it is complete."""
        self._fields += part
        self._forward(size, self._block)
        if len(self._block) > _FRAME_MAX:
            raise InspectionError("http:too-large", f"an HTTP/2 field block has more than {_FRAME_MAX} bytes")
        if not flags & _END_HEADERS:
            return
        self._check_block(self._decode(bytes(self._fields)))
        out += self._block
        self._fields.clear()
        self._block.clear()

    def _decode(self, block: bytes) -> list[tuple[bytes, bytes]]:
        from hpack import HPACKError

        fields: list[HeaderTuple] = []
        try:
            fields = list(self._decoder.decode(block, raw=True))
        except HPACKError:
            _malformed("an HTTP/2 field block is malformed or too large")
        return [(bytes(name), bytes(value)) for name, value in fields]

    def _check_block(self, fields: list[tuple[bytes, bytes]]) -> None:
        """Check the fields of a request, or of the trailer of an open request."""
        stream, ends = self._block_stream, self._block_flags & _END_STREAM
        pseudo = [field for field in fields if field[0].startswith(b":")]
        plain = dict(fields[len(pseudo) :])
        for name, value in fields[len(pseudo) :]:
            binary = self._takes_binary and name.endswith(b"-bin") and value.startswith(b"\0")
            if not _NAME.fullmatch(name) or not (binary or _VALUE.fullmatch(value)) or _is_hop(name):
                _malformed("an HTTP/2 field is not allowed")
        if stream <= self._last_stream:
            if pseudo or not ends or not plain.keys().isdisjoint({b"host", b"content-length"}):
                _malformed("an HTTP/2 trailer is not allowed")
            self._count_body(stream, 0, _END_STREAM)
            return
        if stream % 2 == 0:
            _malformed("an HTTP/2 stream has an invalid number")
        self._last_stream = stream
        self._check_request(dict(pseudo), fields)
        lengths = [value for name, value in fields if name == b"content-length"]
        if len(lengths) > 1:
            raise InspectionError("http:ambiguous-length", "the length of the request's body is ambiguous")
        if lengths:
            if len(self._bodies) >= _BODIES_MAX:
                raise InspectionError("http:too-large", "too many HTTP/2 requests have an incomplete body")
            self._bodies[stream] = parse_length(lengths[0])
            if ends:
                self._count_body(stream, 0, _END_STREAM)

    def _check_request(self, pseudo: dict[bytes, bytes], fields: list[tuple[bytes, bytes]]) -> None:
        """Check method, path and host of a request."""
        if len(pseudo) != sum(name.startswith(b":") for name, _ in fields) or not pseudo.keys() <= set(_PSEUDO):
            _malformed("an HTTP/2 request has an unknown or duplicate pseudo-header field")
        method, path = pseudo.get(b":method", b""), pseudo.get(b":path", b"")
        if method.upper() == b"CONNECT":
            raise InspectionError("http:connect", "the request asks for a tunnel (CONNECT)")
        if not re.fullmatch(WORD, method) or pseudo.get(b":scheme") not in {b"http", b"https"}:
            _malformed("an HTTP/2 request has no valid method and scheme")
        if not _PATH.fullmatch(path) and (method, path) != (b"OPTIONS", b"*"):
            _malformed("the path of an HTTP/2 request does not start with /")
        hosts = [value for name, value in fields if name in {b":authority", b"host"}]
        if not hosts:
            raise InspectionError("http:no-host", "the request has no Host")
        for host in hosts:
            self._check_host(check_authority(host, self._port, need_port=True))


def _is_hop(name: bytes) -> bool:
    plain = name.replace(b"_", b"-")
    return plain in _HOP or (plain != name and plain in {b"content-length", b"host"})


def _header(data: bytes | bytearray) -> tuple[int, int, int, int]:
    """Return length, type, flags and stream of a frame (RFC 9113, 4.1). Raises InspectionError for the reserved bit."""
    stream = int.from_bytes(data[5:9])
    if stream >> 31:
        _malformed("an HTTP/2 frame has a reserved bit")
    return int.from_bytes(data[:3]), data[3], data[4], stream


def _unpadded(payload: bytes, flags: int) -> bytes:
    """Return the field block of a HEADERS frame without padding and priority."""
    padding = 0
    if flags & _PADDED:
        padding = payload[0] if payload else 1
        payload = payload[1:]
    if flags & _WITH_PRIORITY:
        padding += 0 if len(payload) >= _PRIORITY_SIZE else 1
        payload = payload[_PRIORITY_SIZE:]
    if padding > len(payload):
        _malformed("an HTTP/2 frame has no room for its padding")
    return payload[: len(payload) - padding]
