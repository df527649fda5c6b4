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
_BLANKS: Final = (b" ", b"\t", b"\x0b", b"\x0c", b"\r", b"\0", b"\xa0", b"\x85", b"\r\n ", b"\n ")
"""What some parsers skip, and others keep."""
_CUTS: Final = (b" ", b"\t", b"\0", b"\r", b", ", b",", b";", b"@", b":", b"#", b"?", b"\\", b"/", b":80@", b"%00")
"""What ends a host for some parsers, and is a part of it for others."""


def _words(text: bytes) -> tuple[bytes, ...]:
    """Return the words of a table, which have no white space in them."""
    return tuple(text.split())


def _around(*texts: bytes, odd: tuple[bytes, ...] = _BLANKS) -> tuple[bytes, ...]:
    """Return each text with each oddity before and behind it."""
    return tuple(made for text in texts for one in odd for made in (one + text, text + one))


_METHODS: Final = (
    *_words(
        b"GET HEAD POST PUT DELETE OPTIONS TRACE PATCH CONNECT connect CoNNeCT get PRI QUERY PROPFIND PURGE SOURCE"
    ),
    *_words(b"M-X LOCK REPORT SUBSCRIBE BREW PROXY GET: @ _"),
    *(b"G\0ET", b"GET\x01", b"\x01GET", b"GE T", b""),
)
_VERSIONS: Final = (
    *_words(b"HTTP/1.0 HTTP/1.1x HTTP/1.2 HTTP/2.0 HTTP/0.9 HTTP/1. HTTP/11 HTTP/1.10 http/1.1 HTTP/01.1 HTTP/-1.1"),
    *_words(b"HTTP/1,1 ICY/1.0 HTTPS/1.1 RTSP/1.0 HTTP/3 Http/1.1 SIP/2.0"),
    *(b"HTTP/1.1 ", b"HTTP/1.1\t", b"HTTP/1.1 x", b"", b"HTTP /1.1", b"HTTP/1.1\0", b"\tHTTP/1.1"),
)
_TARGETS: Final = (
    *(b"http://G%bE/" % cut for cut in _CUTS),
    *(b"http://G%b@E/" % cut for cut in (b"", b":80", b"#", b"?", b"\\")),
    *_words(b"/a?x=http://E/ * http://E/ http://G/ HTTP://E/ http://E@G/ http:///E/ http:E/ http:/E/ //E/ E:80 G:80"),
    *_words(b"https://E/ ftp://E/ E http://[::1]/ http://203.0.113.66/ 203.0.113.66:80 http://G:80:E/ http://E%2f@G/"),
    *_words(
        b"urn:E unix:/x|http://E/ ws://E/ /../../E /?@E /#http://E/ http://G http://G? http://G./ http://G:/ ? /;@E"
    ),
    *_words(b"/ws /%0d%0aHost:%20E cache_object://E/ icap://E/ gopher://E/ whois://E/ wais://E/ coap://E/ data:E"),
    *(b"", b"\\\\E\\", b"/\x01", b"/ http://E/", b"/\xff", b"http:\\\\E\\", b"http://\x01E/", b"\x01http://E/"),
    b"http://g\xc3\xb6E/",
)
_HOSTS: Final = (
    *(b"Host: G%bE" % cut for cut in _CUTS),
    *(b"%bHost: E" % odd for odd in (*_BLANKS, b":", b"\xef\xbb\xbf")),
    *(b"Host%b: E" % odd for odd in _BLANKS),
    *(b"Host: %bG" % odd for odd in _BLANKS),
    *(b"X: y%bHost: E" % end for end in (b"\n", b"\r", b"\r\r", b"\n\r")),
    *_words(b"Host:E Host: Host Host=E"),
    *(
        b"Host: " + host
        for host in _words(b"E E@G http://E E/G G:80 G. G.:80 G: G:080 G:99999 [::1] 203.0.113.66 xn--E")
    ),
    *(
        b'Host: "E"',
        b"Host: 'E",
        b"HOST: E",
        b"Host; E",
        b"Ho\rst: E",
        b"Host: G\x0c",
        b"Host: G\r\n E",
        b"Host: G\n E",
    ),
    *(
        b"Host: \r\n E",
        b"X:\n\n\nHost: E",
        b"H\xc3\xb6st: E",
        b"Host:\0E",
        b"h: E",
        b":authority: E",
        b"Forwarded: host=E",
    ),
    *(name + b": E" for name in _words(b"X-Forwarded-Host X-Host Via X-HTTP-Host-Override X-Forwarded-Server")),
    *(b"Proxy-Host: E", b"Alt-Used: E", b"X-Original-URL: http://E/", b"X-Rewrite-URL: http://E/"),
)
_CONNECTIONS: Final = (b"close", b"keep-alive", b"Host", b"close, Host", b"x", b"Content-Length", b"Transfer-Encoding")
_UPGRADES: Final = (b"websocket", b"TLS/1.0", b"h2c, websocket", b"HTTP/2.0", b"E")
_OTHERS: Final = (
    *(b"Connection: " + value for value in _CONNECTIONS),
    *(b"Upgrade: %b\r\nConnection: Upgrade" % value for value in _UPGRADES),
    b"Upgrade: E\r\nConnection: upgrade",
    b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AA",
    *(b"Upgrade: websocket", b"Upgrade: h2c", b"Upgrade: ", b"Proxy-Connection: close", b"Keep-Alive: timeout=5"),
    *(b"Expect: 100-continue", b"Expect: 100-Continue, x", b"Expect: E", b"Expect:", b"TE: trailers", b"Trailer: Host"),
    *(b"X: " + b"y" * 9000, b"X: " + b"y" * 70_000, b"X:y\r\n" * 120 + b"Z: z", b"Cookie: a=\xff", b"X: \x7f"),
    *(b"Max-Forwards: 0", b"Range: bytes=0-0", b"Sec-WebSocket-Key: x", b"Content-Type: message/http", b"X\0: y"),
    *(b"Content-Encoding: gzip", b"If-Match: *", b"X-HTTP-Method-Override: CONNECT", b"Proxy-Authorization: x"),
    *(b"", b" ", b"\t", b"\rX: y", b"(: x", b"x"),
)
_SIZES_OF: Final = _words(b"N +N 0N N,N 0xN -1 N.0 NeN N_0 N; 00000000000000000000000N 4294967296 9223372036854775808")
_LENGTHS: Final = (
    *(b"Content-Length: " + size for size in (*_SIZES_OF, *_around(b"N"), b"N, N", b"N N", b"\xd9\xa1")),
    *(b"Content-Length: %d" % size for size in (1 << 64, (1 << 64) + 1, 1 << 128)),
    *(b"Content-Length: %b\r\nContent-Length: %b" % pair for pair in ((b"N", b"N"), (b"N", b"0"), (b"0", b"N"))),
    *(b"Content-Length%b: N" % odd for odd in _BLANKS),
    b"Content-Length:\r\n N",
    *(
        b"Content-Length:",
        b"Content-Length:N ",
        b"Content_Length: N",
        b"X: y\nContent-Length: N",
        b"X: y\rContent-Length: N",
    ),
)
_CODINGS: Final = (
    *_words(b"chunked Chunked CHUNKED xchunked chunked;q=1 identity deflate chunked, ,chunked \xffchunked"),
    *_around(b"chunked"),
    *(other + b", chunked" for other in _words(b"identity gzip chunked trailers")),
    *(b"chunked, identity", b'"chunked"', b"", b"chu\0nked", b"chunked gzip"),
    *(b"chunked\r\nTransfer-Encoding: x", b"x\r\nTransfer-Encoding: chunked"),
)
_CODING_NAMES: Final = (
    *(b"Transfer-Encoding: ", b"Transfer-Encoding:", b"transfer-encoding: ", b"X: y\nTransfer-Encoding: ", b"TE: "),
    *(b"Transfer%bEncoding: " % odd for odd in (b"_", b" ")),
    *(b"Transfer-Encoding%b: " % odd for odd in _BLANKS),
    *(b"%bTransfer-Encoding: " % odd for odd in _BLANKS),
)
_SIZES: Final = (
    *_around(b"%x"),
    *_words(b"0x%x +%x 00%x %x;E %x;a=b -%x 1%016x %X %x, %x# 00000000000000000000%x %xg _%x %x_"),
    *(b'%x;a="\r\n"', b"%x;\n", b"%x;" + b"y" * 9000),
)
_ENDS: Final = (b"00\r\n", b"0;x\r\n", b"0\n", b"", b"-0\r\n", b"0 \r\n", b"000000000000000000000\r\n", b"0\r")
PREFIXES: Final = (
    *(b"\r\n", b"\n", b"\r", b" ", b"\t", b"\0", b"\x01", b"\r\n\r\n", b"\x0b", b"\x0c", b"\x7f", b"\x80", b"\xff"),
    *(b"\xef\xbb\xbf", b"\x1a\x03", b"\x16", b"\x16\x03\x01", b"\r\n\0", b"x\0\n", b"\x05\x01\0", PROXY_1, PROXY_2),
    *(b"\n" * 8191, b"\n" * 66_000, b"\r\n" * 4096, *(byte * 8192 for byte in (b"\n", b" ", b"\0", b"\r"))),
    *(b"PROXY UNKNOWN\r\n", b"PROXY TCP6 ::1 ::1 1 1\r\n", b"hello\r\n", b"\x04\x01\0\x50\x7f\0\0\x01\0"),
    *(b"HTTP/1.1 200 OK\r\n\r\n", b"GET /\r\n", b"GET / HTTP/1.0\r\n\r\n"),
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
