"""Inspection of a connection's first bytes: allowed names and recognized protocols."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from tests.fuzz.fuzz_client_hello import ADDRESS, DENIED, NAME, TLS_ANSWER, denied, pieces, run
from tests.fuzz.tls import body, extension, hello, message, records, sni
from x07_sandbox.network.first_bytes import HELD_MAX, Inspector
from x07_sandbox.network.protocols import InspectionError

if TYPE_CHECKING:
    from x07_sandbox.network.first_bytes import Mode
    from x07_sandbox.network.hosts import Host

GOOD: Final = hello(sni(b"a.example"))
NAMELESS: Final = hello(extension(43, b"\x02\x03\x04"))
SSL_REQUEST: Final = bytes.fromhex("00000008 04d2162f")
GSS_REQUEST: Final = bytes.fromhex("00000008 04d21630")
STARTUP: Final = bytes.fromhex("00000023 00030000") + b"user\0me\0application_name\0\0\0"
GET: Final = b"GET /x HTTP/1.1\r\nHost: a.example\r\n\r\n"
BIG: Final = 1 << 20


def inspector(mode: Mode, host: Host = NAME, port: int = 80) -> Inspector:
    """The inspector of a new connection."""
    return Inspector(mode, host, port, denied)


def verdict(
    mode: Mode, data: bytes, host: Host = NAME, size: int = BIG, answer: bytes = TLS_ANSWER
) -> tuple[str, bytes]:
    """The rule that refuses the bytes, or "", and the bytes forwarded. The server answers the first message."""
    found = run(mode, host, pieces(data, size), answer)
    return found.rule, found.forwarded


def refusal(inspected: Inspector, data: bytes) -> InspectionError:
    """The error for these bytes of the client."""
    with pytest.raises(InspectionError) as caught:
        inspected.from_client(data)
    return caught.value


@pytest.mark.parametrize("mode", ["tls", "any"])
@pytest.mark.parametrize("answer", [b"\x16\x03\x03\x00\x7a", b"\x15\x03\x01\x00\x02\x02\x28"])
def test_a_hello_with_the_name_opens_the_connection(mode: Mode, answer: bytes) -> None:
    """A ClientHello with the listed name passes, and further bytes once the server has answered with TLS."""
    inspected = inspector(mode)
    early = b"\x17\x03\x03\x00\x01x"
    assert inspected.from_client(GOOD[:50]) == b""
    assert (inspected.held, inspected.decided, inspected.transparent) == (50, False, False)
    assert inspected.from_client(GOOD[50:] + early) == GOOD
    assert (inspected.held, inspected.decided, inspected.transparent) == (len(early), True, False)
    for byte in pieces(answer, 1):
        inspected.from_server(byte)
    assert inspected.from_client(b"") == early
    assert (inspected.tls_name, inspected.watches_server, inspected.transparent) == (NAME, False, True)
    assert inspected.from_client(b"anything") == b"anything"


@pytest.mark.parametrize("mode", ["tls", "any"])
def test_a_server_without_tls_gets_nothing_after_the_hello(mode: Mode) -> None:
    """If the server does not answer the ClientHello with TLS, nothing else reaches it."""
    inspected = inspector(mode)
    assert inspected.from_client(GOOD + GET) == GOOD
    with pytest.raises(InspectionError) as caught:
        inspected.from_server(b"HTTP/1.1 400 Bad Request\r\n")
    assert caught.value.rule == "tls:not-tls"


@pytest.mark.parametrize("name", [b"A.EXAMPLE", b"a.example.", b"A.Example."])
def test_case_and_a_final_dot_do_not_matter(name: bytes) -> None:
    """Upper case and a final dot do not change a name (attack 50)."""
    assert verdict("tls", hello(sni(name))) == ("", hello(sni(name)))


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (hello(sni(b"b.example")), "tls:other-name"),  # attack 46
        (hello(sni(b"a.example.evil.test")), "tls:other-name"),
        (hello(), "tls:no-sni"),  # attack 47
        (NAMELESS, "tls:no-sni"),
        (records(message(body()[:-2])), "tls:no-sni"),
        (hello(sni(b"a.example", b"b.example")), "tls:two-names"),  # attack 48
        (hello(sni(b"a.example"), sni(b"b.example")), "tls:two-names"),
        (hello(sni(b"192.0.2.7")), "tls:malformed"),  # attack 49
        (hello(sni(b"")), "tls:malformed"),
        (hello(sni(b"a.example\0")), "tls:malformed"),
        (hello(sni(b"a" * 60_000)), "tls:malformed"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "tls:not-tls"),  # attack 53
        (GET, "tls:not-tls"),
        (SSL_REQUEST + GOOD, "tls:not-tls"),
        (records(b"\x01\x01\x00\x00"), "tls:too-large"),
        (GOOD[:40], "first-bytes:incomplete"),
    ],
)
@pytest.mark.parametrize("record", [0, 1])
@pytest.mark.parametrize("size", [1, BIG])
def test_a_tls_port_accepts_only_the_listed_name(data: bytes, rule: str, record: int, size: int) -> None:
    """A TLS port forwards only a ClientHello with the listed name (attacks 46 to 53)."""
    if record and data.startswith(b"\x16") and len(data) < 1000:
        data = records(data[5:], record)
    assert verdict("tls", data, size=size) == (rule, b"")


@pytest.mark.parametrize("mode", ["tls", "any"])
@pytest.mark.parametrize(
    "text",
    [
        b"A /x HTTP/1.1\r\nHost: b.example\r\n\r\n",
        b"A\x0bhttp/1.0",
        b"A http://b.example/x\r\n",
        b"\xa0HTTP/0.9",
        b"HTTPS://b",
    ],
)
def test_a_hello_contains_no_http_request(mode: Mode, text: bytes) -> None:
    """A ClientHello with text that a tolerant HTTP server takes for a request does not pass."""
    for data in (
        hello(sni(b"a.example"), extension(0xAAAA, b" " + text)),
        hello(extension(99, b"\t" + text), sni(b"a.example")),
    ):
        assert verdict(mode, data) == ("first-bytes:unknown", b"")
    protocols = hello(sni(b"a.example"), extension(16, b"\0\x0c\x02h2\x08http/1.1"))
    assert verdict(mode, protocols) == ("", protocols)


def test_ech_passes_under_the_listed_name_only() -> None:
    """An encrypted ClientHello passes only under the listed outer name, and is reported."""
    ech = extension(0xFE0D, bytes(8))
    good = run("tls", NAME, [hello(sni(b"a.example"), ech)])
    assert good.rule == ""
    assert verdict("tls", hello(sni(b"b.example"), ech)) == ("tls:other-name", b"")
    assert verdict("tls", hello(ech)) == ("tls:no-sni", b"")


def test_literal_addresses_need_no_name() -> None:
    """A TLS connection to a literal address needs no name, but may not name a host that is not listed."""
    for data in (NAMELESS, hello(sni(b"b.example"))):
        assert verdict("tls", data, ADDRESS) == ("", data)
    assert verdict("tls", hello(sni(DENIED.upper().encode())), ADDRESS) == ("name:denied", b"")
    assert verdict("tls", hello(sni(b"192.0.2.7")), ADDRESS) == ("tls:malformed", b"")


def test_an_error_has_rule_reason_and_name() -> None:
    """A refusal is final and names its rule and the escaped name."""
    inspected = inspector("tls")
    with pytest.raises(InspectionError) as caught:
        inspected.from_client(hello(sni(b"B.example")))
    assert caught.value.rule == "tls:other-name"
    assert caught.value.name == inspected.tls_name == "b.example"
    assert caught.value.reason == "the TLS ClientHello asks for b.example, but the connection was opened for a.example"
    with pytest.raises(InspectionError) as again:
        inspected.from_client(GOOD)
    assert again.value is caught.value
    odd = run("tls", NAME, [hello(sni(b"\x1b[2J\n" + b"x" * 1000))])
    assert odd.reason.isprintable()
    assert len(odd.reason) < 400


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (b"GET key\r\n", "http:malformed"),  # an inline command of Redis, and a request of HTTP/0.9
        (b"HELO x.example\r\n", "http:malformed"),  # without a greeting
        (b"quit\r\n", "first-bytes:unknown"),
        (b"word " * 1640, "http:malformed"),
        (b"\r\n" * 4096 + b"CONNECT b.example:80 HTTP/1.1\r\n\r\n", "first-bytes:unknown"),
        (b"CONNECT b.example:80 HTTP/1.1x\r\n\r\n", "http:malformed"),
        (b"GET /\x01 HTTP/1.1\r\n", "http:malformed"),
        (b"\x01GET / HTTP/1.1\r\n", "first-bytes:unknown"),
        (b"{", "first-bytes:unknown"),
        (b"\x16\x04", "tls:not-tls"),
        (b"x" * 65, "first-bytes:unknown"),
        (b"hello", "first-bytes:incomplete"),
        (b"\x00\x00\x00", "first-bytes:incomplete"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "first-bytes:incomplete"),
        (STARTUP.replace(b"me", b"\n\r"), "first-bytes:unknown"),
        (STARTUP.replace(b"\x23", b"\x24") + b"\0", "first-bytes:unknown"),
        (b"*1\r\n$24\r\nGET http://b.example/ x\r\n", "first-bytes:unknown"),
        (b"*2\r\n$4\r\nECHO\r\n$5\r\na\r\nb\r\n", "first-bytes:unknown"),
        (b"\x00\x00\x00\x13\x04\xd2\x16\x2eGET /x\r\nabc", "first-bytes:unknown"),  # PostgreSQL's CancelRequest
        (b"\x00\x00\x02\x00\x04\xd2\x16\x2e" + b"x" * 504, "first-bytes:unknown"),
        (b"*1\r\n$5\r\nPING\r\n", "first-bytes:unknown"),
        (b"*1\n$4\nPING\n", "first-bytes:unknown"),
    ],
)
@pytest.mark.parametrize("size", [1, BIG])
def test_bytes_of_no_known_protocol_never_pass(data: bytes, rule: str, size: int) -> None:
    """On a port of any protocol, bytes that the gate does not understand are refused, and none of them passes."""
    assert verdict("any", data, size=size, answer=b"") == (rule, b"")


@pytest.mark.parametrize("data", [b"\0\1\2", b"CONNECT b.example:443 HTTP/1.1\r\n\r\n", GET])
def test_an_opaque_port_is_not_inspected(data: bytes) -> None:
    """On a port of opaque_ports, all bytes pass at once."""
    inspected = inspector("opaque")
    assert (inspected.transparent, inspected.watches_server) == (True, False)
    assert inspected.from_client(data) == data
    inspected.client_eof()


@pytest.mark.parametrize(
    ("greeting", "start"),
    [
        (b"SSH-2.0-OpenSSH_9.6p1 Debian-3\r\n", b"SSH-2.0-OpenSSH_9.6\r\n"),
        (b"220 mail.example ESMTP\r\n", b"EHLO me.example\r\n"),
        (b"220-hello\r\n220 ready\r\n", b"user anonymous\r\n"),
        (b"\x4a\0\0\0\x0a8.0.36\0" + bytes(60), b"\x20\0\0\x01\x85\xae"),
    ],
)
@pytest.mark.parametrize("size", [1, BIG])
def test_a_server_that_greets_proves_its_protocol(greeting: bytes, start: bytes, size: int) -> None:
    """Bytes that fit the server's greeting pass, and so does everything after them."""
    inspected = inspector("any")
    assert inspected.watches_server
    for piece in pieces(greeting, size):
        inspected.from_server(piece)
    assert b"".join(inspected.from_client(piece) for piece in pieces(start, size)) == start
    assert (inspected.transparent, inspected.from_client(b"\n\0")) == (True, b"\n\0")
    other = inspector("any")
    other.from_server(greeting)
    assert refusal(other, GET * 20).rule == "first-bytes:unknown"


def test_an_ssh_client_may_speak_first() -> None:
    """A client's SSH version is held until the server has sent its own."""
    inspected = inspector("any")
    version = b"SSH-2.0-client\r\n"
    assert (inspected.from_client(version), inspected.decided, inspected.held) == (b"", True, len(version))
    inspected.from_server(b"SSH-2.0-server\r\n")
    assert (inspected.from_client(b""), inspected.transparent) == (version, True)
    other = inspector("any")
    other.from_client(version)
    other.from_server(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
    assert refusal(other, b"").rule == "first-bytes:unknown"


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 408 Request Timeout\r\n\r\n", b"+OK POP3\r\n", b"220", b"<html>"])
def test_another_greeting_proves_nothing(greeting: bytes) -> None:
    """After a greeting of HTTP or of an unknown protocol, the client's bytes are inspected as without it."""
    inspected = inspector("any")
    inspected.from_server(greeting)
    assert inspected.from_client(GET) == GET
    for data, rule in (
        (GET.replace(b"a.example", b"b.example"), "http:other-host"),
        (b"\1\2\3", "first-bytes:unknown"),
        (b"USER me\r\n", "http:malformed"),
    ):
        other = inspector("any")
        other.from_server(greeting)
        assert refusal(other, data).rule == rule


@pytest.mark.parametrize(
    ("first", "answer"),
    [
        (STARTUP, b"R\0\0\0\x17\0\0\0\x0a"),
        (STARTUP, b"E\0\0\0\x66S"),
        (b"*1\r\n$4\r\nPING\r\n", b"+PONG\r\n"),
        (b"*3\r\n$5\r\nHELLO\r\n$1\r\n3\r\n$4\r\nAUTH\r\n", b"-NOPROTO no\r\n"),
    ],
)
@pytest.mark.parametrize("size", [1, BIG])
def test_a_first_message_passes_alone_until_it_is_answered(first: bytes, answer: bytes, size: int) -> None:
    """After the first message of PostgreSQL or Redis, further bytes are held until the server's answer."""
    inspected = inspector("any")
    out = b"".join(inspected.from_client(piece) for piece in pieces(first + GET, size))
    assert (out, inspected.held, inspected.transparent) == (first, len(GET), False)
    inspected.client_eof()  # held bytes may still wait for the server
    for piece in pieces(answer, size):
        inspected.from_server(piece)
    assert (inspected.from_client(b""), inspected.transparent) == (GET, True)
    other = inspector("any")
    other.from_client(first)
    with pytest.raises(InspectionError, match="the server's answer is not"):
        other.from_server(b"HTTP/1.1 400 Bad Request\r\n" + b"x" * 600)


@pytest.mark.parametrize("size", [1, BIG])
@pytest.mark.parametrize("gss", [False, True])
def test_postgresql_may_start_tls(size: int, *, gss: bool) -> None:
    """After PostgreSQL's SSLRequest, the server's S must be followed by TLS with the name, and its N by a start."""
    for hello_, rule in (
        (GOOD, ""),
        (NAMELESS, ""),
        (hello(sni(b"b.example")), "tls:other-name"),
        (GET, "tls:not-tls"),
    ):
        inspected = inspector("any")
        if gss:
            assert inspected.from_client(GSS_REQUEST) == GSS_REQUEST
            inspected.from_server(b"N")
        assert b"".join(inspected.from_client(piece) for piece in pieces(SSL_REQUEST, size)) == SSL_REQUEST
        assert inspected.from_client(hello_) == b""
        inspected.from_server(b"S")
        if rule:
            assert refusal(inspected, b"").rule == rule
        else:
            assert inspected.from_client(b"") == hello_
            inspected.from_server(TLS_ANSWER)
            assert inspected.transparent
    plain = inspector("any")
    assert plain.from_client(SSL_REQUEST) == SSL_REQUEST
    plain.from_server(b"N")
    assert plain.from_client(STARTUP) == STARTUP
    assert refusal(_answered(SSL_REQUEST, b"N"), b"\1").rule == "first-bytes:unknown"


def _answered(first: bytes, answer: bytes) -> Inspector:
    inspected = inspector("any")
    inspected.from_client(first)
    inspected.from_server(answer)
    return inspected


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (GET, ""),
        (GET + GET.replace(b"a.example", b"b.example"), "http:other-host"),
        (GET.replace(b"GET", b"get").replace(b"a.example", b"b.example"), "http:other-host"),
        (GET.replace(b"a.example", b"b.example"), "http:other-host"),
        (b"CONNECT b.example:443 HTTP/1.1\r\nHost: b.example\r\n\r\n", "http:connect"),
        (b"GET / HTTP/1.0\r\n\r\n", "http:no-host"),
        # What servers forgive, and would take for a request.
        (b"\r\n" + GET, "first-bytes:unknown"),
        (b"  " + GET, "first-bytes:unknown"),
        (GET.replace(b" ", b"\t"), "first-bytes:unknown"),
        (GET.replace(b"\r", b""), "http:malformed"),
        (b"GET /\xe9 HTTP/1.1 \r\nHost: b.example\r\n\r\n", "http:malformed"),
        (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: b.example\r\n\r\n", "http:other-host"),
        (b"GET / HTTP/1.1", "http:malformed"),
    ],
)
@pytest.mark.parametrize("size", [1, BIG])
def test_http_is_checked_on_every_port(data: bytes, rule: str, size: int) -> None:
    """HTTP hosts are checked on every port, and malformed requests are refused."""
    found, out = verdict("any", data, size=size)
    assert found == rule
    assert b"b.example" not in out
    assert rule or out == data


@pytest.mark.parametrize("mode", ["tls", "http", "any"])
def test_a_silent_client_is_accepted(mode: Mode) -> None:
    """A connection on which the client sends nothing ends without an error."""
    assert verdict(mode, b"") == ("", b"")


@pytest.mark.parametrize("mode", ["tls", "http", "any"])
@pytest.mark.parametrize("data", [b"\x16\x03\x01\x40\x00" * BIG, b"GET /" * BIG, b"\x16\x03\x01\x00\x01\x01" * 100_000])
def test_endless_first_bytes_are_bounded(mode: Mode, data: bytes) -> None:
    """The bytes held without a verdict are limited."""
    inspected, rule = inspector(mode), ""
    try:
        for piece in pieces(data, 4096):
            inspected.from_client(piece)
            assert inspected.held <= HELD_MAX + 4096
            if inspected.transparent:
                break
    except InspectionError as exc:
        rule = exc.rule
    assert inspected.transparent or rule in {
        "tls:too-large",
        "tls:malformed",
        "tls:not-tls",
        "http:too-large",
        "http:malformed",
    }
