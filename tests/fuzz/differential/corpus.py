"""Inputs that once reached a host that was not allowed, or are close to one. They are played before all others."""

from __future__ import annotations

from typing import Final

from tests.fuzz.differential.case import EVIL, GOOD, Case, Mode, Step
from tests.fuzz.tls import hello, sni

NEWLINES: Final = b"\n" * 8192
GET: Final = b"GET / HTTP/1.1\r\nHost: " + GOOD + b"\r\n\r\n"
BAD_GET: Final = b"GET / HTTP/1.1\r\nHost: " + EVIL + b"\r\n\r\n"
ABSOLUTE: Final = b"GET http://" + EVIL + b"/ HTTP/1.1\r\nHost: " + EVIL + b"\r\n\r\n"
CONNECT: Final = b"CONNECT " + EVIL + b":80 HTTP/1.1\r\nHost: " + EVIL + b"\r\n\r\n"
PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SSL_REQUEST: Final = bytes.fromhex("00000008 04d2162f")
PROXY_1: Final = b"PROXY TCP4 127.0.0.1 127.0.0.1 1000 80\r\n"
PROXY_2: Final = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"


def _any(name: str, *steps: Step, half_close: bool = False) -> Case:
    return Case(name, "any", steps, half_close)


def _request(*lines: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Return one frame of HTTP/2."""
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def field(name: bytes, value: bytes) -> bytes:
    """Return one header field of HTTP/2, as a literal without an index and without Huffman codes."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def second(*fields: tuple[bytes, bytes], authority: bytes = EVIL, stream: int = 1) -> bytes:
    """Return a HEADERS frame of a GET request."""
    block = field(b":method", b"GET") + field(b":scheme", b"http") + field(b":path", b"/")
    block += field(b":authority", authority) if authority else b""
    return frame(1, 5, stream, block + b"".join(field(*pair) for pair in fields))


_LENGTH: Final = b"Content-Length: %d" % len(BAD_GET)
_HOST: Final = b"Host: " + GOOD

PROXY_CASES: Final = (
    _any("newlines-pause-connect", NEWLINES, None, CONNECT),
    _any("newlines-pause-absolute", NEWLINES, None, ABSOLUTE),
    _any("newlines-in-two-reads", NEWLINES[:4096], None, NEWLINES[4096:], None, CONNECT),
    _any("crlf-pause-connect", b"\r\n" * 4096, None, CONNECT),
    _any("connect-odd-version", CONNECT.replace(b"HTTP/1.1", b"HTTP/1.1x", 1)),
    _any("connect-no-version", b"CONNECT " + EVIL + b":80\r\n\r\n"),
    _any("connect-lower-case", CONNECT.replace(b"CONNECT", b"connect", 1)),
    _any("absolute-http-0.9", b"GET http://" + EVIL + b"/\r\n"),
    _any("absolute-http-0.9-end", b"GET http://" + EVIL + b"/", None, half_close=True),
    _any("absolute-http-0.9-blank", b"GET http://" + EVIL + b"/\r\n\r\n"),
    _any("absolute-odd-version", ABSOLUTE.replace(b"HTTP/1.1", b"HTTP/1.1x", 1)),
    _any("proxy-line", PROXY_1 + ABSOLUTE),
    _any("proxy-line-connect", PROXY_1, None, CONNECT),
    _any("proxy-2", PROXY_2 + ABSOLUTE),
    _any("control-before", b"\x01" + ABSOLUTE),
    _any("control-before-connect", b"\0" + CONNECT),
    _any("control-in-target", ABSOLUTE.replace(b"/ HTTP", b"/\x01 HTTP", 1)),
    _any("control-before-target", ABSOLUTE.replace(b"GET ", b"GET \x01", 1)),
    _any("control-in-connect", CONNECT.replace(b":80 ", b":80\x01 ", 1)),
    _any("control-after-method", ABSOLUTE.replace(b"GET ", b"GET\x01 ", 1)),
    _any("high-bytes-before", b"\xef\xbb\xbf" + ABSOLUTE),
    _any("no-slash", b"GET http:" + EVIL + b"/ HTTP/1.1\r\nHost: " + EVIL + b"\r\n\r\n"),
    _any("ftp-target", ABSOLUTE.replace(b"http:", b"ftp:", 1)),
    _any("bare-line-feeds", ABSOLUTE.replace(b"\r", b"")),
    _any("tabs", ABSOLUTE.replace(b" ", b"\t")),
    _any("form-feeds", ABSOLUTE.replace(b" ", b"\x0c")),
)
"""What a listed proxy must not get: requests for another server, in the forms that lax proxies take."""

ORIGIN_CASES: Final = (
    _any("newlines-pause-get", NEWLINES, None, BAD_GET),
    _any("newlines-get", NEWLINES + BAD_GET),
    _any("other-host", BAD_GET),
    _any("second-request", GET + BAD_GET),
    _any("second-request-later", GET, None, BAD_GET),
    _any("http-0.9", b"GET /\r\n"),
    _any("http-1.0-no-host", b"GET / HTTP/1.0\r\n\r\n"),
    _any("odd-version", BAD_GET.replace(b"HTTP/1.1", b"HTTP/1.1x")),
    _any("two-hosts", _request(b"GET / HTTP/1.1", _HOST, b"Host: " + EVIL)),
    _any("host-with-space", _request(b"GET / HTTP/1.1", _HOST, b"Host : " + EVIL)),
    _any("folded-host", _request(b"GET / HTTP/1.1", _HOST, b" " + EVIL)),
    _any("null-in-host", _request(b"GET / HTTP/1.1", _HOST + b"\0" + EVIL)),
    _any("long-line", b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: " + EVIL + b"\r\n\r\n"),
    _any("http-2", PREFACE + frame(4, 0, 0, b"") + second()),
    _any("http-2-second", PREFACE + frame(4, 0, 0, b"") + second(authority=GOOD) + second(stream=3)),
    _any("http-2-host", PREFACE + frame(4, 0, 0, b"") + second((b"host", EVIL), authority=b"")),
    _any("http-2-two", PREFACE + frame(4, 0, 0, b"") + second((b"host", EVIL), authority=GOOD)),
    _any("newlines-pause-http-2", NEWLINES, None, PREFACE + frame(4, 0, 0, b"") + second()),
)
"""What a listed server must not get on any port."""


def _both(name: str, *steps: Step) -> tuple[Case, Case]:
    modes: tuple[Mode, Mode] = ("any", "http")
    return Case(f"{name}-any", modes[0], steps), Case(f"{name}-http", modes[1], steps)


BODY_CASES: Final = (
    *_both("get-with-body", _request(b"GET / HTTP/1.1", _HOST, _LENGTH, body=BAD_GET)),
    *_both("get-with-late-body", _request(b"GET / HTTP/1.1", _HOST, _LENGTH), None, BAD_GET),
    *_both("head-with-body", _request(b"HEAD / HTTP/1.1", _HOST, _LENGTH, body=BAD_GET)),
    *_both("delete-with-body", _request(b"DELETE / HTTP/1.1", _HOST, _LENGTH, body=BAD_GET)),
    *_both("options-with-body", _request(b"OPTIONS / HTTP/1.1", _HOST, _LENGTH, body=BAD_GET)),
    *_both("unknown-with-body", _request(b"QUERY / HTTP/1.1", _HOST, _LENGTH, body=BAD_GET)),
    *_both("post-with-body", _request(b"POST / HTTP/1.1", _HOST, _LENGTH, body=BAD_GET)),
    *_both("post-waits-for-100", _request(b"POST / HTTP/1.1", _HOST, _LENGTH, b"Expect: 100-continue"), None, BAD_GET),
    *_both(
        "get-chunked",
        _request(b"GET / HTTP/1.1", _HOST, b"Transfer-Encoding: chunked", body=b"%x\r\n" % len(BAD_GET)),
        BAD_GET + b"\r\n0\r\n\r\n",
    ),
    *_both(
        "length-and-chunked",
        _request(b"POST / HTTP/1.1", _HOST, b"Content-Length: 5", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
        BAD_GET,
    ),
    *_both(
        "length-over-2-to-64", _request(b"POST / HTTP/1.1", _HOST, b"Content-Length: 18446744073709551616"), BAD_GET
    ),
    *_both("length-over-2-to-63", _request(b"POST / HTTP/1.1", _HOST, b"Content-Length: 9223372036854775808"), BAD_GET),
    *_both("length-with-zeros", _request(b"POST / HTTP/1.1", _HOST, b"Content-Length: 0%d" % len(BAD_GET)), BAD_GET),
    *_both(
        "websocket-refused",
        _request(b"GET / HTTP/1.1", _HOST, b"Connection: Upgrade", b"Upgrade: websocket"),
        None,
        BAD_GET,
    ),
    *_both(
        "h2c-upgrade",
        _request(
            b"GET / HTTP/1.1", _HOST, b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AA"
        ),
        None,
        PREFACE + frame(4, 0, 0, b"") + second(stream=3),
    ),
    *_both(
        "request-as-trailer",
        _request(b"POST / HTTP/1.1", _HOST, b"Transfer-Encoding: chunked", body=b"1\r\nx\r\n0\r\n"),
        b"GET: http://" + EVIL + b"/ HTTP/1.1\r\n\r\n",
    ),
    *_both("host-is-hop-by-hop", _request(b"GET / HTTP/1.1", _HOST, b"Connection: Host")),
    *_both(
        "length-is-hop-by-hop", _request(b"POST / HTTP/1.1", _HOST, _LENGTH, b"Connection: Content-Length"), BAD_GET
    ),
)
"""Requests whose end servers find in different places, with a request to another host in their bodies."""

PROTOCOL_CASES: Final = (
    _any("ssh-then-http", b"SSH-2.0-x\r\n", None, BAD_GET),
    _any("ssh-and-http", b"SSH-2.0-x\r\n" + BAD_GET),
    _any("smtp-then-http", b"EHLO x\r\n", None, BAD_GET),
    _any("smtp-helo-then-proxy", b"HELO x\r\n", None, ABSOLUTE),
    _any("ftp-then-http", b"USER x\r\n", None, BAD_GET),
    _any("redis-then-http", b"*1\r\n$4\r\nPING\r\n", None, BAD_GET),
    _any("redis-inline-then-http", b"PING\r\n", None, BAD_GET),
    _any("redis-inline-get", b"GET http://" + EVIL + b"/\r\n", None, b"\r\n"),
    _any("postgres-then-http", b"\0\0\0\x11\0\x03\0\0user\0x\0\0", None, BAD_GET),
    _any("postgres-length-is-http", b"\0\0\x01\0\0\x03\0\0user\0\r\n\r\n" + BAD_GET, None, BAD_GET),
    _any("ssl-request-then-http", SSL_REQUEST, None, BAD_GET),
    _any("mysql-then-http", None, b"\x20\0\0\x01\x85\xa6\xff\x01\0\0\0\x01\x21" + bytes(23), None, BAD_GET),
    _any("nothing-then-http", None, None, BAD_GET),
    _any("mqtt-then-http", b"\x10\x0c\0\x04MQTT\x04\x02\0<\0\0", None, BAD_GET),
    _any("amqp-then-http", b"AMQP\0\0\x09\x01", None, BAD_GET),
    _any("socks-4", b"\x04\x01\0\x50\0\0\0\x01\0" + EVIL + b"\0"),
    _any("unknown-word-then-http", b"hello world\r\n", None, BAD_GET),
    _any("unknown-long-line-then-http", b"word " * 2000, None, b"\r\n" + BAD_GET),
    _any("binary-then-http", b"\x7fELF\0\0\0\0", None, BAD_GET),
)
"""First bytes of other protocols, then a request."""

TLS_CASES: Final = (
    Case("tls-other-name", "tls", (hello(sni(EVIL)),)),
    Case("tls-other-name-any", "any", (hello(sni(EVIL)),)),
    Case("tls-no-name", "tls", (hello(),)),
    Case("tls-two-names", "any", (hello(sni(GOOD), sni(EVIL)),)),
    Case("tls-postgres-other-name", "any", (SSL_REQUEST, None, hello(sni(EVIL)))),
    Case("tls-then-http", "any", (hello(sni(GOOD)), None, BAD_GET)),
    Case("tls-cut", "any", (hello(sni(EVIL))[:1], None, hello(sni(EVIL))[1:])),
)

CORPUS: Final = (*PROXY_CASES, *ORIGIN_CASES, *BODY_CASES, *PROTOCOL_CASES, *TLS_CASES)
