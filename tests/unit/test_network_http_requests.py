"""HTTP inspection: which requests pass, and in which form."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import pytest

from tests.fuzz.fuzz_client_hello import ADDRESS, denied, pieces, run
from tests.fuzz.fuzz_http_requests import parse
from x07_sandbox.network.first_bytes import Inspector
from x07_sandbox.network.http_requests import HEAD_MAX
from x07_sandbox.network.protocols import InspectionError

if TYPE_CHECKING:
    from x07_sandbox.network.hosts import Host

NAME: Final = "a.example"
HOST: Final = b" HTTP/1.1\r\nHost: a.example\r\n"
GET: Final = b"GET /x" + HOST + b"\r\n"
OTHER: Final = GET.replace(b"a.example", b"b.example")
POST: Final = b"POST /x" + HOST
CHUNKED: Final = POST + b"Transfer-Encoding: chunked\r\n\r\n"
LAST: Final = b"Connection: close\r\n\r\n"
HANDSHAKE: Final = b"GET /w" + HOST + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: eA==\r\n\r\n"
ACCEPTED: Final = b"HTTP/1.1 101 Switching Protocols\r\n\r\n"
REFUSED: Final = b"HTTP/1.1 400 Bad Request\r\n\r\n"


def http(host: Host = NAME, port: int = 80) -> Inspector:
    """The inspector of a new connection."""
    return Inspector("http", host, port, denied)


def forwarded(data: bytes, host: Host = NAME, size: int = 1 << 20, port: int = 80) -> bytes:
    """The bytes forwarded for valid requests."""
    inspected = http(host, port)
    out = b"".join(inspected.from_client(piece) for piece in pieces(data, size))
    inspected.client_eof()
    assert inspected.decided
    assert inspected.held == 0
    return out


def refused(data: bytes, host: Host = NAME, size: int = 1 << 20) -> tuple[str, bytes]:
    """The rule that refuses the bytes, and the bytes forwarded before."""
    found = run("http", host, pieces(data, size), answer=b"")
    return found.rule, found.forwarded


@pytest.mark.parametrize(
    "data",
    [
        GET,
        GET * 3,
        GET + POST + b"Content-Length: 3\r\n" + LAST + b"abc",
        POST + b"Content-Length: 0\r\n\r\n" + GET,
        GET + CHUNKED[:-2] + LAST + b"3\r\nabc\r\n0\r\n\r\n",
        CHUNKED[:-2] + LAST + b"3\r\nabc\r\n0\r\nDigest: x\r\n\r\n",
        b"OPTIONS *" + HOST + b"\r\n",
        b"GET / HTTP/1.0\r\nHost: a.example\r\n\r\n",
        b"GET /?q=%20&r=http://b.example/ HTTP/1.1\r\nhOST: A.Example.:80\r\nCookie: a=\xe9\r\n\r\n",
        b"PROPFIND //b.example/" + HOST + b"Connection: close\r\n\r\n",
    ],
)
@pytest.mark.parametrize("size", [7, 1 << 20])
def test_good_requests_arrive(data: bytes, size: int) -> None:
    """Valid requests for the listed host arrive unchanged."""
    assert parse(forwarded(data, size=size), named=True) == parse(data, named=True)
    assert forwarded(data) == data


def test_requests_are_written_again() -> None:
    """Requests are rewritten in one strict form."""
    assert forwarded(b"GET /" + HOST + b"X:\r\n\r\n") == b"GET /" + HOST + b"X: \r\n\r\n"
    assert forwarded(b"GET /" + HOST + b"X:  y \t\r\n\r\n") == b"GET /" + HOST + b"X: y\r\n\r\n"
    assert forwarded(CHUNKED + b"003;n=v\r\nabc\r\n000\r\n\r\n") == CHUNKED[:-2] + LAST + b"3\r\nabc\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    ("target", "written"),
    [(b"http://a.example/x?y", b"/x?y"), (b"HTTP://A.EXAMPLE:80", b"/"), (b"http://a.example.?y", b"/?y")],
)
def test_an_absolute_target_must_name_the_host(target: bytes, written: bytes) -> None:
    """An absolute request target is accepted only if it names the same host (attack 59)."""
    assert forwarded(b"GET " + target + HOST + b"\r\n") == b"GET " + written + HOST + b"\r\n"


@pytest.mark.parametrize(
    ("head", "rule"),
    [
        (b"GET /x HTTP/1.1\r\nHost: b.example\r\n", "http:other-host"),  # attack 54
        (b"GET /x HTTP/1.1\r\nHost: 192.0.2.7\r\n", "http:other-host"),
        (b"GET /x HTTP/1.1\r\nHost: a.example:\r\n", "http:malformed"),
        (b"GET /x HTTP/1.1\r\nHost: a.example:0\r\n", "http:malformed"),
        (b"GET /x HTTP/1.1\r\nHost: u@a.example\r\n", "http:malformed"),
        (b"GET /x HTTP/1.1\r\nHost: a.example, b.example\r\n", "http:malformed"),
        (b"GET /x HTTP/1.1\r\nHost: a.example/\r\n", "http:malformed"),
        (b"GET /x HTTP/1.1\r\nHost: \r\n", "http:no-host"),
        (b"GET /x HTTP/1.1\r\nX: y\r\n", "http:no-host"),
        (b"GET /x HTTP/1.0\r\n", "http:no-host"),
        (b"GET /x" + HOST + b"Host: a.example\r\n", "http:malformed"),
        (b"GET /x" + HOST + b"host: b.example\r\n", "http:malformed"),
        (b"GET http://b.example/" + HOST, "http:other-host"),  # attack 59
        (b"GET http://a.example:81/" + HOST, "http:other-host"),
        (b"GET http://a.example@b.example/" + HOST, "http:malformed"),
        (b"GET https://a.example/" + HOST, "http:malformed"),
        (b"GET http://a.example/#x" + HOST, "http:malformed"),
        (b"GET x" + HOST, "http:malformed"),
        (b"GET *" + HOST, "http:malformed"),
        (b"CONNECT a.example:443" + HOST, "http:connect"),  # attack 60
        (b"connect a.example:443" + HOST, "http:connect"),
        (b"PRI * HTTP/2.0\r\n", "http:upgrade"),  # attack 61
        (b"GET / HTTP/2.0\r\nHost: a.example\r\n", "http:upgrade"),
        (b"GET /x HTTP/0.9\r\nHost: a.example\r\n", "http:malformed"),
        (b"GET /x\r\n", "http:malformed"),
        (b"GET  /x" + HOST, "http:malformed"),
        (b"GET /x y" + HOST, "http:malformed"),
        (b"\r\n" + GET[:-2], "http:malformed"),
        (b"\x16\x03\x01\x02\x00", "http:malformed"),
        (GET[:-2] + b"X : y\r\n", "http:malformed"),  # attack 58
        (b"GET /x HTTP/1.1\r\nHost : a.example\r\n", "http:malformed"),
        (GET[:-2] + b"X: y\r\n z\r\n", "http:malformed"),
        (GET[:-2] + b"X: y\n", "http:malformed"),
        (b"GET /x HTTP/1.1\nHost: a.example\r\n", "http:malformed"),
        (GET[:-2] + b"X: y\rHost: b.example\r\n", "http:malformed"),
        (GET[:-2] + b"X: \0\r\n", "http:malformed"),
        (GET[:-2] + b"X\r\n", "http:malformed"),
        (GET[:-2] + b": y\r\n", "http:malformed"),
        (POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n", "http:ambiguous-length"),  # attack 56
        (POST + b"Content-Length: 3\r\nContent-Length: 3\r\n", "http:ambiguous-length"),  # attack 57
        (POST + b"Content-Length: 3, 4\r\n", "http:malformed"),
        (POST + b"Content-Length: 1000000000000000\r\n", "http:ambiguous-length"),
        (POST + b"Content_Length: 3\r\n", "http:malformed"),
        (POST + b"Transfer_Encoding: chunked\r\n", "http:malformed"),
        (b"GET /x HTTP/1.1\r\nHost: a.example:8080\r\n", "http:other-host"),
        (POST + b"Content-Length: " + b"9" * 5000 + b"\r\n", "http:malformed"),
        (POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", "http:ambiguous-length"),
        (POST + b"Transfer-Encoding: gzip, chunked\r\n", "http:malformed"),
        (POST.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n", "http:ambiguous-length"),
    ],
)
@pytest.mark.parametrize("size", [1, 1 << 20])
def test_refused_requests_pass_no_byte(head: bytes, rule: str, size: int) -> None:
    """A request for another host, or an ambiguous one, forwards no byte."""
    assert refused(head + b"\r\n", size=size) == (rule, b"")
    rule_of_second, out = refused(GET + head + b"\r\n", size=size)
    assert rule_of_second == rule
    assert out in (b"", GET)


@pytest.mark.parametrize(
    "body",
    [
        b"3\r\nabcGET / HTTP/1.1\r\n\r\n",
        b"3\nabc\r\n0\r\n\r\n",
        b"0x3\r\nabc\r\n",
        b"-1\r\n",
        b"\r\n",
        b"123456789012345678901\r\n",
        b"0\r\nHost: b.example\r\n\r\n",
        b"0\r\nContent-Length: 3\r\n\r\n",
        b"0\r\nX : y\r\n\r\n",
        b"0\r\nX: \x01\r\n\r\n",
        b"0\r\n" + OTHER,
    ],
)
@pytest.mark.parametrize("size", [1, 1 << 20])
def test_chunks_smuggle_no_request(body: bytes, size: int) -> None:
    """Malformed chunks are refused, and nothing behind them passes (attack 63)."""
    rule, out = refused(CHUNKED + body + b"\r\n" * 40, size=size)
    assert rule in {"http:malformed", "http:other-host", "http:too-large"}
    assert b"GET" not in out
    assert b"b.example" not in out


@pytest.mark.parametrize("size", [1000, 1 << 20])
def test_heads_have_a_limit(size: int) -> None:
    """A request head is limited to 64 KiB (attack 62)."""
    field = b"X: " + b"y" * (HEAD_MAX - len(GET) - 5) + b"\r\n"
    assert forwarded(GET[:-2] + field + b"\r\n", size=size) == GET[:-2] + field + b"\r\n"
    assert refused(GET[:-2] + b"y" + field + b"\r\n", size=size) == ("http:too-large", b"")
    assert refused(GET[:-2] + b"X: " + b"y" * (1 << 20), size=size) == ("http:too-large", b"")
    assert refused(b"G" * (1 << 20), size=size) == ("http:too-large", b"")
    rule, out = refused(CHUNKED + b"3;" + b"x" * (1 << 20), size=size)
    assert rule == "http:too-large"
    assert out in (b"", CHUNKED[:-2] + LAST)


def test_a_body_is_not_held() -> None:
    """A request body is streamed."""
    inspected = http()
    head = POST + b"Content-Length: 1000000\r\n"
    assert inspected.from_client(head + b"\r\n") == head + LAST
    for _ in range(10):
        assert inspected.from_client(bytes(100_000)) == bytes(100_000)
        assert inspected.held == 0


@pytest.mark.parametrize("data", [GET[:-1], POST + b"Content-Length: 3\r\n\r\nab", CHUNKED + b"3\r\nabc\r\n0\r\n"])
def test_an_end_inside_a_request_is_an_error(data: bytes) -> None:
    """A connection that ends within a request is an error."""
    inspected = http()
    inspected.from_client(GET)
    inspected.client_eof()
    inspected.from_client(data)
    with pytest.raises(InspectionError, match="inside a request"):
        inspected.client_eof()


@pytest.mark.parametrize("size", [1, 1 << 20])
def test_websocket_passes_once_it_is_accepted(size: int) -> None:
    """WebSocket data is held until the server accepts the handshake, then passes unchanged."""
    inspected = http()
    out = b"".join(inspected.from_client(piece) for piece in pieces(HANDSHAKE + b"\x81\x05hello", size))
    assert (out, inspected.held) == (HANDSHAKE, 7)
    assert (inspected.watches_server, inspected.transparent) == (True, False)
    for piece in pieces(ACCEPTED, size):
        inspected.from_server(piece)
    assert (inspected.from_client(b""), inspected.held) == (b"\x81\x05hello", 0)
    assert inspected.transparent
    assert inspected.from_client(OTHER) == OTHER


@pytest.mark.parametrize("answer", [REFUSED, b"HTTP/1.0 101 x\r\n\r\n", b"HTTP/1.1 1010\r\n\r\n", b"x" * 20])
def test_a_refused_websocket_is_still_http(answer: bytes) -> None:
    """After a rejected WebSocket handshake, requests are checked as before (attack 64)."""
    for following, rule in ((GET, ""), (OTHER, "http:other-host"), (b"\x81\x05hello", "http:malformed")):
        inspected = http()
        assert inspected.from_client(HANDSHAKE + following) == HANDSHAKE
        inspected.from_server(answer)
        assert (inspected.watches_server, inspected.transparent) == (False, False)
        if not rule:
            assert inspected.from_client(b"") == following
            continue
        with pytest.raises(InspectionError) as caught:
            inspected.from_client(b"")
        assert caught.value.rule == rule


def test_websocket_bytes_have_a_limit() -> None:
    """At most 64 KiB are held until a WebSocket handshake is answered."""
    inspected = http()
    inspected.from_client(HANDSHAKE + bytes(HEAD_MAX))
    with pytest.raises(InspectionError) as caught:
        inspected.from_client(b"x")
    assert caught.value.rule == "http:too-large"


@pytest.mark.parametrize("host", [b"192.0.2.7", b"192.0.2.7:80", b"b.example", b"B.example.:80"])
def test_literal_addresses_take_their_own_host_and_listed_names(host: bytes) -> None:
    """An HTTP request to a literal address may name this address, or a name that is listed for the port too."""
    request = GET.replace(b"a.example", host)
    assert forwarded(request, ADDRESS) == request


def test_literal_addresses_open_no_other_host() -> None:
    """A request to a literal address can name neither another address nor a name that is not listed."""
    assert refused(GET.replace(b"a.example", b"Denied.Example:80"), ADDRESS) == ("name:denied", b"")
    assert refused(GET.replace(b"a.example", b"192.0.2.8"), ADDRESS) == ("http:other-host", b"")
    assert refused(GET.replace(b"a.example", b"[2001:db8::1]"), ADDRESS) == ("http:other-host", b"")


@pytest.mark.parametrize(
    ("fields", "written"),
    [
        (b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n", b""),
        (b"Upgrade: websocket, h2c\r\nConnection: keep-alive, Upgrade\r\n", b"Connection: keep-alive\r\n"),
        (b"Upgrade: websocket\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n", b""),
        (b"Upgrade: websocket\r\n", b""),
        (b"Connection: Host, X, close\r\n", b"Connection: close\r\n"),
    ],
)
def test_upgrades_and_unknown_connection_options_are_removed(fields: bytes, written: bytes) -> None:
    """Headers of upgrades, except a WebSocket handshake, are removed, and so are unknown options in Connection."""
    assert forwarded(GET[:-2] + fields + b"\r\n" + GET) == GET[:-2] + written + b"\r\n" + GET


@pytest.mark.parametrize(
    "request_",
    [
        GET[:-2] + b"Content-Length: 3\r\n\r\nabc",
        GET[:-2] + b"Connection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        GET.replace(b"GET", b"HEAD")[:-2] + b"Content-Length: 3\r\n\r\nabc",
        POST + b"Connection: keep-alive\r\nContent-Length: 3\r\n\r\nabc",
        POST + b"Expect: 100-continue\r\n\r\n",
        GET[:-2] + b"Upgrade: websocket\r\nConnection: Upgrade\r\nContent-Length: 1\r\n\r\nx",
    ],
)
@pytest.mark.parametrize("size", [1, 1 << 20])
def test_nothing_follows_a_body_that_servers_may_not_read(request_: bytes, size: int) -> None:
    """A request with a body, which some servers do not read, is the last of its connection."""
    out = forwarded(request_, size=size)
    head, _, body = out.partition(b"\r\n\r\n")
    assert [line for line in head.split(b"\r\n") if line.startswith((b"Connection", b"Upgrade"))] == [
        b"Connection: close"
    ]
    assert body.replace(b"1\r\nx", b"x") in (b"", b"abc", b"x", b"3\r\nabc\r\n0\r\n\r\n") or size == 1
    rule, passed = refused(request_ + GET, size=size)
    assert rule == "http:malformed"
    assert passed.count(b"GET") <= 1


def test_lengths_are_written_in_one_form() -> None:
    """A body's length is written without leading zeros."""
    assert forwarded(POST + b"Content-Length: 0003\r\n\r\nabc") == POST + b"Content-Length: 3\r\n" + LAST + b"abc"


def test_a_host_may_omit_the_port_but_not_change_it() -> None:
    """A missing port of a request's host is added, and a request cannot ask for another port of the host."""
    whole = GET.replace(b"a.example", b"a.example:8080")
    for host in (b"a.example", b"a.example:8080"):  # without a port, proxies would take port 80
        assert forwarded(GET.replace(b"a.example", host), port=8080) == whole
    with pytest.raises(InspectionError, match="asks for port 80, but the connection was opened for port 8080"):
        http(port=8080).from_client(GET.replace(b"a.example", b"a.example:80"))


def test_errors_show_guest_text_escaped_and_cut() -> None:
    """Reasons contain guest text only escaped and shortened."""
    with pytest.raises(InspectionError) as caught:
        http().from_client(b"GET /x HTTP/1.1\r\nHost: \xe9'\\" + b"x" * 5000 + b"\r\n\r\n")
    assert caught.value.reason.isprintable()
    assert len(caught.value.reason) < 400


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost:a.example\r\n\r\n" * 3000,
        GET[:-2] + b"a:\r\n" * 16_000 + b"\r\n",
        CHUNKED + b"1\r\nx\r\n" * 20_000 + b"0\r\n\r\n",
        CHUNKED + b"1;" + b"x" * 60_000 + b"\r\nx\r\n0\r\n\r\n",
        GET[:-2] + b"X:" + b" y" * 30_000 + b"\r\n\r\n",
        GET[:-2] + b"X:" + b" " * 60_000 + b"\r\n\r\n",
    ],
)
@pytest.mark.parametrize("size", [1, 1 << 20])
def test_hostile_requests_take_linear_time(data: bytes, size: int) -> None:
    """Hostile requests take linear time."""
    start = time.process_time()
    forwarded(data, size=size)
    assert time.process_time() - start < 5
