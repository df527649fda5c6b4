"""Random HTTP/1 connections with a few oddities each, by a grammar of what lenient parsers are known to accept."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from tests.fuzz.differential.case import EVIL, GOOD, Step
from tests.fuzz.differential.corpus import PROXY_1, PROXY_2

if TYPE_CHECKING:
    from random import Random

_SPACES: Final = (b"\t", b"  ", b"\x0b", b"\x0c", b"\r", b" \t", b"\xa0", b"\0", b"")
_LINE_ENDS: Final = (b"\n", b"\r", b"\r\r\n", b"\n\r", b" \r\n", b"\x85", b"\x0b\r\n", b"\r\n ")
_METHODS: Final = (
    *(b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"TRACE", b"PATCH", b"CONNECT", b"connect", b"CoNNeCT"),
    *(
        b"get",
        b"PRI",
        b"QUERY",
        b"PROPFIND",
        b"G\0ET",
        b"GET\x01",
        b"\x01GET",
        b"GE T",
        b"",
        b"PURGE",
        b"SOURCE",
        b"M-X",
    ),
    *(b"LOCK", b"REPORT", b"SUBSCRIBE", b"BREW", b"PROXY", b"GET:", b"@", b"_"),
)
_VERSIONS: Final = (
    *(
        b"HTTP/1.0",
        b"HTTP/1.1x",
        b"HTTP/1.2",
        b"HTTP/2.0",
        b"HTTP/0.9",
        b"HTTP/1.",
        b"HTTP/11",
        b"HTTP/1.10",
        b"http/1.1",
    ),
    *(
        b"HTTP/01.1",
        b"HTTP/1.1 ",
        b"HTTP/1.1\t",
        b"HTTP/1.1 x",
        b"HTTP/-1.1",
        b"HTTP/1,1",
        b"ICY/1.0",
        b"HTTPS/1.1",
        b"",
    ),
    *(b"RTSP/1.0", b"HTTP /1.1", b"HTTP/1.1\0", b"HTTP/3", b"Http/1.1", b"\tHTTP/1.1", b"SIP/2.0"),
)
_TARGETS: Final = (
    *(
        b"/a?x=http://E/",
        b"*",
        b"http://E/",
        b"http://G/",
        b"HTTP://E/",
        b"http://G@E/",
        b"http://E@G/",
        b"http://G:80@E/",
    ),
    *(b"http:///E/", b"http:E/", b"http:/E/", b"//E/", b"E:80", b"G:80", b"https://E/", b"ftp://E/", b"http://G#@E/"),
    *(
        b"http://G?@E/",
        b"http://G\\@E/",
        b"http://G\tE/",
        b"http://G E/",
        b"http://G\0E/",
        b"E",
        b"",
        b"\\\\E\\",
        b"/\x01",
    ),
    *(b"http://[::1]/", b"http://203.0.113.66/", b"203.0.113.66:80", b"http://G,E/", b"http://G;E/", b"http://G%00E/"),
    *(b"http://G:80:E/", b"http://G:E/", b"http://E%2f@G/", b"urn:E", b"unix:/x|http://E/", b"ws://E/", b"/ http://E/"),
    *(b"/../../E", b"/?@E", b"/#http://E/", b"http://G", b"http://G?", b"http://G./", b"http://G:/", b"?", b"/;@E"),
    *(
        b"/ws",
        b"/\xff",
        b"/%0d%0aHost:%20E",
        b"http:\\\\E\\",
        b"http://\x01E/",
        b"\x01http://E/",
        b"http://g\xc3\xb6E/",
    ),
    *(b"cache_object://E/", b"icap://E/", b"gopher://E/", b"whois://E/", b"wais://E/", b"coap://E/", b"data:E"),
)
_HOSTS: Final = (
    *(
        b"Host: E",
        b"Host : E",
        b"Host\t: E",
        b" Host: E",
        b"\tHost: E",
        b"\0Host: E",
        b"Host\0: E",
        b"Host:E",
        b"HOST: E",
    ),
    *(
        b"Host: G, E",
        b"Host: G E",
        b"Host: G\tE",
        b"Host: G\0E",
        b"Host: G\rE",
        b"Host: G@E",
        b"Host: E@G",
        b"Host: http://E",
    ),
    *(
        b"Host: G/E",
        b"Host: E/G",
        b"Host: G:80@E",
        b"Host: G:E",
        b"Host: G#E",
        b"Host: G?E",
        b"Host: G\\E",
        b"Host:",
        b"Host",
    ),
    *(
        b"Host: G:80",
        b"Host: G.",
        b"Host: G.:80",
        b"Host: G:",
        b"Host: G:080",
        b"Host: G:99999",
        b"Host: \x0bG",
        b"Host: G\x0c",
    ),
    *(
        b"Host=E",
        b"Host; E",
        b":Host: E",
        b"Ho\rst: E",
        b"Host: G\r\n E",
        b"Host: G\n E",
        b"Host: \r\n E",
        b"X: y\nHost: E",
    ),
    *(
        b"X: y\rHost: E",
        b"X: y\r\rHost: E",
        b"X: y\n\rHost: E",
        b"X:\n\n\nHost: E",
        b"Host: [::1]",
        b"Host: 203.0.113.66",
    ),
    *(
        b"Host: xn--E",
        b"H\xc3\xb6st: E",
        b"Host\xa0: E",
        b'Host: "E"',
        b"Host: 'E",
        b"\xef\xbb\xbfHost: E",
        b"Host:\0E",
        b"h: E",
    ),
    *(
        b":authority: E",
        b"X-Forwarded-Host: E",
        b"Forwarded: host=E",
        b"X-Host: E",
        b"X-Original-URL: http://E/",
        b"Via: E",
    ),
    *(
        b"X-HTTP-Host-Override: E",
        b"X-Forwarded-Server: E",
        b"X-Rewrite-URL: http://E/",
        b"Proxy-Host: E",
        b"Alt-Used: E",
    ),
)
_OTHERS: Final = (
    *(
        b"Connection: close",
        b"Connection: keep-alive",
        b"Connection: Host",
        b"Connection: close, Host",
        b"Connection: x",
    ),
    *(
        b"Connection: Content-Length",
        b"Connection: Transfer-Encoding",
        b"Proxy-Connection: close",
        b"Keep-Alive: timeout=5",
    ),
    *(b"Expect: 100-continue", b"Expect: 100-Continue, x", b"Expect: E", b"Expect:", b"TE: trailers", b"Trailer: Host"),
    *(
        b"Upgrade: websocket\r\nConnection: Upgrade",
        b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AA",
    ),
    *(
        b"Upgrade: websocket",
        b"Upgrade: TLS/1.0\r\nConnection: Upgrade",
        b"Upgrade: E\r\nConnection: upgrade",
        b"Upgrade: ",
    ),
    *(b"Upgrade: h2c", b"Upgrade: h2c, websocket\r\nConnection: Upgrade", b"Upgrade: HTTP/2.0\r\nConnection: Upgrade"),
    *(
        b"X: " + b"y" * 9000,
        b"X: " + b"y" * 70_000,
        b"X:y\r\n" * 120 + b"Z: z",
        b"Cookie: a=\xff",
        b"X: \x7f",
        b"",
        b" ",
        b"\t",
    ),
    *(
        b"Max-Forwards: 0",
        b"Range: bytes=0-0",
        b"Sec-WebSocket-Key: x",
        b"Content-Type: message/http",
        b"X\x00: y",
        b"\rX: y",
    ),
    *(
        b"Content-Encoding: gzip",
        b"If-Match: *",
        b"X-HTTP-Method-Override: CONNECT",
        b"Proxy-Authorization: x",
        b"(: x",
        b"x",
    ),
)
_LENGTHS: Final = (
    *(
        b"Content-Length: N",
        b"Content-Length: +N",
        b"Content-Length: 0N",
        b"Content-Length: N, N",
        b"Content-Length:N ",
    ),
    *(
        b"Content-Length: N\x0b",
        b"Content-Length: 0xN",
        b"Content-Length: N N",
        b"Content-Length: -1",
        b"Content-Length: N.0",
    ),
    *(b"Content-Length: N\r\nContent-Length: N", b"Content-Length: N\r\nContent-Length: 0", b"Content-Length : N"),
    *(b"Content-Length: 0\r\nContent-Length: N", b"Content-Length:", b"Content_Length: N", b"Content-Length\0: N"),
    *(b"Content-Length: 18446744073709551616", b"Content-Length: 4294967296", b"Content-Length: 9223372036854775808"),
    *(b"Content-Length: 18446744073709551617", b"Content-Length: N\0", b"Content-Length: NeN", b"Content-Length: N_0"),
    *(
        b"Content-Length: 00000000000000000000000N",
        b"Content-Length: \xd9\xa1",
        b"Content-Length: N;",
        b"X: y\nContent-Length: N",
    ),
    *(b"Content-Length: 340282366920938463463374607431768211456", b"Content-Length:\r\n N", b"X: y\rContent-Length: N"),
)
_CODINGS: Final = (
    *(
        b"chunked",
        b"Chunked",
        b"CHUNKED",
        b"chunked, identity",
        b"identity, chunked",
        b"gzip, chunked",
        b"xchunked",
        b" chunked",
    ),
    *(
        b"chunked\x0b",
        b"chunked;q=1",
        b'"chunked"',
        b"chunked, chunked",
        b"",
        b"chu\0nked",
        b"identity",
        b"chunked,",
        b",chunked",
    ),
    *(
        b"\tchunked",
        b"chunked\t",
        b"\r\n chunked",
        b"chunked\r\nTransfer-Encoding: x",
        b"x\r\nTransfer-Encoding: chunked",
    ),
    *(b"deflate", b"chunked\x85", b"\xffchunked", b"chunked\0", b"trailers, chunked", b"chunked gzip"),
)
_CODING_NAMES: Final = (
    *(
        b"Transfer-Encoding: ",
        b"Transfer-Encoding:",
        b"transfer-encoding: ",
        b"Transfer_Encoding: ",
        b"Transfer-Encoding : ",
    ),
    *(b" Transfer-Encoding: ", b"X: y\nTransfer-Encoding: ", b"Transfer-Encoding\0: ", b"TE: ", b"Transfer Encoding: "),
)
_SIZES: Final = (
    *(
        b"0x%x",
        b" %x",
        b"%x ",
        b"+%x",
        b"00%x",
        b"%x;E",
        b"%x;a=b",
        b'%x;a="\r\n"',
        b"%x\t",
        b"-%x",
        b"%x;\n",
        b"1%016x",
        b"%x\0",
    ),
    *(b"%X", b"%x,", b"%x#", b"%x;" + b"y" * 9000, b"00000000000000000000%x", b"%xg", b"%x\x0b", b"_%x", b"%x_"),
)
_ENDS: Final = (b"00\r\n", b"0;x\r\n", b"0\n", b"", b"-0\r\n", b"0 \r\n", b"000000000000000000000\r\n", b"0\r")
PREFIXES: Final = (
    *(
        b"\r\n",
        b"\n",
        b"\r",
        b" ",
        b"\t",
        b"\0",
        b"\x01",
        b"\r\n\r\n",
        b"\x0b",
        b"\x0c",
        b"\x7f",
        b"\x80",
        b"\xef\xbb\xbf",
        b"\xff",
    ),
    *(
        b"\n" * 8191,
        b"\n" * 8192,
        b"\r\n" * 4096,
        b" " * 8192,
        b"\n" * 66_000,
        b"\0" * 8192,
        b"\r" * 8192,
        PROXY_1,
        PROXY_2,
    ),
    *(
        b"PROXY UNKNOWN\r\n",
        b"PROXY TCP6 ::1 ::1 1 1\r\n",
        b"hello\r\n",
        b"\x05\x01\0",
        b"\x04\x01\0\x50\x7f\0\0\x01\0",
        b"x\0\n",
    ),
    *(
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"GET /\r\n",
        b"GET / HTTP/1.0\r\n\r\n",
        b"\x1a\x03",
        b"\x16",
        b"\x16\x03\x01",
        b"\r\n\0",
    ),
)


_E: Final = re.compile(rb"(?<![A-Z])E(?![A-Za-z])")
_G: Final = re.compile(rb"(?<![A-Z])G(?![A-Za-z\0])")


PLACES: Final = ("prefix", "method", "space", "target", "version", "line end", "host", "field", "framing", "chunk")


class Writer:
    """Writes one random connection. odds: the chance of an oddity in each of PLACES; 0 if it is missing."""

    def __init__(self, random: Random, odds: dict[str, float]) -> None:
        self._random = random
        self._odds = odds

    def _odd(self, place: str) -> bool:
        return self._random.random() < self._odds.get(place, 0.0)

    def _pick(self, place: str, usual: bytes, others: tuple[bytes, ...]) -> bytes:
        return _filled(self._random.choice(others)) if self._odd(place) else usual

    def connection(self) -> list[Step]:
        """Return the steps of a client: one to three requests, with pauses."""
        random = self._random
        steps: list[Step] = []
        if self._odd("prefix"):
            steps.append(random.choice(PREFIXES))
            if random.random() < 0.5:
                steps.append(None)
        for _ in range(random.choice((1, 2, 2, 3))):
            steps += self.request(EVIL if random.random() < 0.1 else GOOD)
            if random.random() < 0.3:
                steps.append(None)
        return steps

    def request(self, host: bytes) -> list[Step]:
        """Return a request: its head, and its body if it has one."""
        random = self._random
        usual = b"/" if random.random() < 0.8 else b"http://" + host + b"/"
        method = random.choice((b"GET", b"GET", b"POST", b"HEAD", b"PUT", b"DELETE"))
        line = [self._pick("method", method, _METHODS), self._pick("space", b" ", _SPACES)]
        line += [self._pick("target", usual, _TARGETS), self._pick("space", b" ", _SPACES)]
        line += [self._pick("version", b"HTTP/1.1", _VERSIONS)]
        fields = [b"Host: " + host]
        for place, table in (("host", _HOSTS), ("field", _OTHERS)):
            while self._odd(place):
                fields.insert(random.randrange(len(fields) + 1), _filled(random.choice(table)))
        if self._odd("host"):
            fields.remove(b"Host: " + host)
        body: list[Step] = []
        if random.random() < 0.4:
            framing, body = self._body()
            at = random.randrange(len(fields) + 1)
            fields[at:at] = framing
        head = b"".join(text + self._pick("line end", b"\r\n", _LINE_ENDS) for text in (b"".join(line), *fields, b""))
        return [head, *body]

    def _body(self) -> tuple[list[bytes], list[Step]]:
        """Return the framing fields of a body, and the body: another request, which some servers may see as one."""
        random = self._random
        inner = b"GET / HTTP/1.1\r\nHost: " + EVIL + b"\r\n\r\n"
        content = random.choice((inner, inner, b"x=1", b"", b"\r\n" + inner, b"x" * 40_000 + inner))
        wait: list[Step] = [None] if random.random() < 0.2 else []
        fields: list[bytes] = []
        chunked = random.random() < 0.5
        if chunked or self._odd("framing"):
            name = self._pick("framing", _CODING_NAMES[0], _CODING_NAMES)
            fields.append(name + self._pick("framing", b"chunked", _CODINGS))
        if not chunked or self._odd("framing"):
            length = self._pick("framing", _LENGTHS[0], _LENGTHS)
            size = random.choice((0, 3, len(content))) if self._odd("framing") else len(content)
            fields.append(length.replace(b"N", b"%d" % size))
        random.shuffle(fields)
        return fields, [*wait, self._chunks(content) if chunked else content]

    def _chunks(self, content: bytes) -> bytes:
        """Return a chunked body, perhaps with a trailer."""
        cut = self._random.randrange(len(content) + 1)
        out = b""
        for piece in (content[:cut], content[cut:]):
            if piece or self._odd("chunk"):
                out += self._pick("chunk", b"%x", _SIZES) % len(piece) + self._pick("chunk", b"\r\n", _LINE_ENDS)
                out += piece + self._pick("chunk", b"\r\n", (*_LINE_ENDS, b"", b"xx"))
        trailer = self._pick("chunk", b"", tuple(text + b"\r\n" for text in (*_HOSTS, *_OTHERS, *_LENGTHS)))
        return out + self._pick("chunk", b"0\r\n", _ENDS) + trailer + b"\r\n"


def _filled(text: bytes) -> bytes:
    """Return a text of the tables with the two hosts in the places of E and G, where these are no part of a word."""
    return _E.sub(EVIL, _G.sub(GOOD, text))
