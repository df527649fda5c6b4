"""Inspection of a client's HTTP/2 frames on a connection without TLS (RFC 9113, prior knowledge).

Frames are forwarded unchanged, each after its check. Every request must be for the host of the connection. Behind the
client's preface and first SETTINGS frame, all bytes are held until the server's first frame proves that it speaks
HTTP/2: an HTTP/1 server could find a request line in them.

A proxy may translate a request to HTTP/1. Therefore fields that could end a line or change the length of a body there
are refused too (RFC 9113, 8.2 and 10.3).
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NoReturn

from x07_sandbox.network.http_requests import WORD, check_authority, parse_length
from x07_sandbox.network.names import Host
from x07_sandbox.network.protocols import InspectionError

if TYPE_CHECKING:
    from hpack.struct import HeaderTuple

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
    """The client's half of one HTTP/2 connection. The properties are those of `http_requests.RequestStream`.

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


def _malformed(why: str) -> NoReturn:
    raise InspectionError("http:malformed", why) from None
