"""Inspection of a connection's first bytes: allowed names and recognized protocols."""

from __future__ import annotations

import ssl
from typing import Final, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.fuzz_client_hello import (
    DENIED,
    HELD_MAX,
    NAME,
    body,
    denied,
    extension,
    hello,
    message,
    one_input,
    pieces,
    records,
    run,
    sni,
)
from x07_sandbox.network.first_bytes import Inspector
from x07_sandbox.network.inspection_error import InspectionError

Mode = Literal["tls", "http", "any"]
GOOD: Final = hello(sni(b"a.example"))
NAMELESS: Final = hello(extension(43, b"\x02\x03\x04"))
SSL_REQUEST: Final = bytes.fromhex("00000008 04d2162f")
GSS_REQUEST: Final = bytes.fromhex("00000008 04d21630")
GET: Final = b"GET /x HTTP/1.1\r\nHost: a.example\r\n\r\n"
BIG: Final = 1 << 20


def verdict(mode: Mode, data: bytes, name: str | None = NAME, size: int = BIG) -> tuple[str, bytes]:
    """The rule that refuses the bytes, or "", and the bytes forwarded."""
    found = run(mode, name, pieces(data, size))
    return found.rule, found.forwarded


def test_a_hello_with_the_name_opens_the_connection() -> None:
    """A ClientHello with the listed name opens the connection, which is then transparent."""
    inspected = Inspector("tls", NAME, denied)
    early = b"\x17\x03\x03\x00\x01x"
    assert inspected.from_client(GOOD[:50]) == b""
    assert (inspected.held, inspected.decided, inspected.transparent) == (50, False, False)
    assert inspected.from_client(GOOD[50:] + early) == GOOD + early
    assert (inspected.held, inspected.decided, inspected.transparent) == (0, True, True)
    assert (inspected.tls_name, inspected.watches_server) == (NAME, False)
    assert inspected.from_client(b"anything") == b"anything"


@pytest.mark.parametrize("name", [b"A.EXAMPLE", b"a.example.", b"A.Example."])
def test_case_and_a_final_dot_do_not_matter(name: bytes) -> None:
    """Upper case and a final dot do not change a name (attack 50)."""
    assert verdict("tls", hello(sni(name))) == ("", hello(sni(name)))


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (hello(sni(b"b.example")), "tls:other-name"),  # attack 46
        (hello(sni(b"xa.example")), "tls:other-name"),
        (hello(sni(b"a.example.evil.test")), "tls:other-name"),
        (hello(), "tls:no-sni"),  # attack 47
        (NAMELESS, "tls:no-sni"),
        (records(message(body()[:-2])), "tls:no-sni"),
        (hello(sni(b"a.example", b"b.example")), "tls:two-names"),  # attack 48
        (hello(sni(b"a.example"), sni(b"b.example")), "tls:two-names"),
        (hello(sni(b"192.0.2.7")), "tls:malformed"),  # attack 49
        (hello(sni(b"2001:db8::1")), "tls:malformed"),
        (hello(sni(b"")), "tls:malformed"),
        (hello(sni(b"a.example\0")), "tls:malformed"),
        (hello(sni(b"a.example..")), "tls:malformed"),
        (hello(sni("\u00e4.example".encode())), "tls:malformed"),
        (hello(sni(b"a" * 60_000)), "tls:malformed"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "tls:not-tls"),  # attack 53
        (GET, "tls:not-tls"),
        (SSL_REQUEST + GOOD, "tls:not-tls"),
        (records(b"\x01\x01\x00\x00"), "tls:too-large"),
        (GOOD[:40], "tls:malformed"),
    ],
)
@pytest.mark.parametrize("record", [0, 1])
@pytest.mark.parametrize("size", [1, BIG])
def test_a_tls_port_accepts_only_the_listed_name(data: bytes, rule: str, record: int, size: int) -> None:
    """A TLS port forwards only a ClientHello with the listed name (attacks 46 to 53)."""
    if record and data.startswith(b"\x16") and len(data) < 1000:
        data = records(data[5:], record)
    assert verdict("tls", data, size=size) == (rule, b"")


def test_a_stalled_hello_is_held() -> None:
    """An unfinished ClientHello is held until the gate's timeout (attack 52)."""
    inspected = Inspector("tls", NAME, denied)
    inspected.from_client(GOOD[:-1])
    assert (inspected.decided, inspected.held) == (False, len(GOOD) - 1)


def test_ech_passes_under_the_listed_name_only() -> None:
    """An encrypted ClientHello passes only under the listed outer name, and is reported."""
    ech = extension(0xFE0D, bytes(8))
    good = run("tls", NAME, [hello(sni(b"a.example"), ech)])
    assert good.rule == ""
    assert verdict("tls", hello(sni(b"b.example"), ech)) == ("tls:other-name", b"")
    assert verdict("tls", hello(ech)) == ("tls:no-sni", b"")


def test_literal_addresses_need_no_name() -> None:
    """A TLS connection to a literal address needs no name, but may not name a denied host."""
    for data in (NAMELESS, hello(sni(b"b.example"))):
        assert verdict("tls", data, None) == ("", data)
    assert verdict("tls", hello(sni(DENIED.upper().encode())), None) == ("name:denied", b"")
    assert verdict("tls", hello(sni(b"192.0.2.7")), None) == ("tls:malformed", b"")


def test_an_error_has_rule_reason_and_name() -> None:
    """A refusal is final and names its rule and the escaped name."""
    inspected = Inspector("tls", NAME, denied)
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


@pytest.mark.parametrize("name", [NAME, None])
def test_real_hellos_pass_on_every_port(name: str | None) -> None:
    """A real ClientHello passes on TLS ports and on ports of any protocol."""
    outgoing = ssl.MemoryBIO()
    context = ssl.create_default_context()
    connection = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=NAME)
    with pytest.raises(ssl.SSLWantReadError):
        connection.do_handshake()
    data = outgoing.read()
    for mode in ("tls", "any"):
        found = run(mode, name, [data])
        assert (found.rule, found.forwarded, found.inspected.tls_name) == ("", data, NAME)


@pytest.mark.parametrize(
    "data",
    [
        b"GET key\r\n",  # redis
        b"*1\r\n$4\r\nPING\r\n",
        b"HELO x.example\r\n",
        b"SSH-2.0-OpenSSH_9.6p1 Debian-3\r\n",
        b"quit\r\n",
        b"SOURCE / ICY/1.0\r\n",
        b"{",
        b"<?xml version='1.0'?>",
        b"AMQP\x00",
        b"\x00\x00\x00\x54\x00\x03\x00\x00user\x00",  # PostgreSQL without encryption
        b"\x10\x20MQTT",
        b"\x16\x04",
        b"\xff\x00",
    ],
)
@pytest.mark.parametrize("size", [1, BIG])
def test_other_protocols_pass_at_once_on_their_ports(data: bytes, size: int) -> None:
    """On a port of any protocol, bytes that are neither TLS nor HTTP pass at once."""
    inspected = Inspector("any", NAME, denied)
    out = b"".join(inspected.from_client(piece) for piece in pieces(data, size))
    assert out == data
    assert (inspected.decided, inspected.transparent, inspected.held) == (True, True, 0)


@pytest.mark.parametrize("data", [b"GET ", b"hello", b"\x16", b"\x00\x00\x00\x08\x04", b"\r\n", b"EHLO a b c"])
def test_an_open_start_waits_and_passes_at_its_end(data: bytes) -> None:
    """Bytes that may become TLS or HTTP are held, and pass if the client stops there."""
    inspected = Inspector("any", NAME, denied)
    assert inspected.from_client(data) == b""
    assert (inspected.decided, inspected.held) == (False, len(data))
    inspected.client_eof()
    assert inspected.from_client(b"") == data
    assert inspected.transparent


@pytest.mark.parametrize("prelude", [b"", SSL_REQUEST, GSS_REQUEST, GSS_REQUEST + SSL_REQUEST])
@pytest.mark.parametrize("size", [1, BIG])
def test_tls_is_checked_on_every_port(prelude: bytes, size: int) -> None:
    """TLS names are checked on every port, also after PostgreSQL's SSLRequest."""
    assert verdict("any", prelude + GOOD, size=size) == ("", prelude + GOOD)
    assert verdict("any", prelude + NAMELESS, size=size) == ("", prelude + NAMELESS)
    rule, out = verdict("any", prelude + hello(sni(b"b.example")), size=size)
    assert rule == "tls:other-name"
    assert prelude.startswith(out)


def test_an_ssl_request_is_forwarded_at_once() -> None:
    """PostgreSQL's SSLRequest is forwarded at once, and the bytes after it are inspected."""
    inspected = Inspector("any", NAME, denied)
    assert inspected.from_client(SSL_REQUEST) == SSL_REQUEST
    assert (inspected.decided, inspected.transparent) == (False, False)
    assert inspected.from_client(b"\x00\x00\x00\x54\x00\x03") == b"\x00\x00\x00\x54\x00\x03"
    assert inspected.transparent


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (GET, ""),
        (GET + GET.replace(b"a.example", b"b.example"), "http:other-host"),
        (GET.replace(b"a.example", b"b.example"), "http:other-host"),
        (GET.replace(b"GET", b"get").replace(b"a.example", b"b.example"), "http:other-host"),
        (b"CONNECT b.example:443 HTTP/1.1\r\nHost: b.example\r\n\r\n", "http:connect"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "http:upgrade"),
        (b"GET / HTTP/1.0\r\n\r\n", "http:no-host"),
        # What servers forgive, and would take for a request.
        (b"\r\n" + GET, "http:malformed"),
        (b"  " + GET, "http:malformed"),
        (GET.replace(b" ", b"\t"), "http:malformed"),
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


def test_an_unfinished_line_can_be_released() -> None:
    """Text of an unfinished line can be released early, each byte once."""
    inspected = Inspector("any", NAME, denied)
    assert (inspected.from_client(b"HE"), inspected.release(), inspected.release()) == (b"", b"HE", b"")
    assert (inspected.held, inspected.decided) == (0, False)
    assert (inspected.from_client(b"L"), inspected.release()) == (b"", b"L")
    assert inspected.from_client(b"O me\r\nmore") == b"O me\r\nmore"
    assert inspected.transparent


@pytest.mark.parametrize("size", [1, 3, 7])
def test_a_released_request_is_checked(size: int) -> None:
    """A request whose first line was released early is still checked."""
    for data, rule in ((GET, ""), (GET.replace(b"a.example", b"b.example"), "http:other-host")):
        inspected, forwarded, found = Inspector("any", NAME, denied), b"", ""
        try:
            for piece in pieces(data, size):
                forwarded += inspected.from_client(piece) + inspected.release()
        except InspectionError as exc:
            found = exc.rule
        assert found == rule
        line = data.index(b"\r\n")
        assert forwarded == data if not rule else data.startswith(forwarded) and len(forwarded) <= line + 1


def test_an_ambiguous_first_byte_is_released() -> None:
    """A released first byte does not prevent the check of the ClientHello that follows."""
    for start in (GOOD, SSL_REQUEST + GOOD):
        inspected = Inspector("any", NAME, denied)
        assert inspected.from_client(start[:1]) + inspected.release() == start[:1]
        assert (inspected.held, inspected.decided) == (0, False)
        assert inspected.from_client(start[1:]) == start[1:]
        assert inspected.tls_name == NAME
    inspected = Inspector("any", "other.example", denied)
    assert inspected.from_client(GOOD[:1]) + inspected.release() == GOOD[:1]
    with pytest.raises(InspectionError):
        inspected.from_client(GOOD[1:])


def test_a_request_must_match_its_released_start() -> None:
    """A request that contradicts its released beginning ends the connection."""
    inspected = Inspector("any", NAME, denied)
    absolute = b"GET http://a.example/x HTTP/1.1\r\nHost: a.example\r\n\r\n"
    assert inspected.from_client(absolute[:8]) + inspected.release() == b"GET http"
    with pytest.raises(InspectionError) as caught:
        inspected.from_client(absolute[8:])
    assert caught.value.rule == "http:malformed"


@pytest.mark.parametrize(("mode", "data"), [("any", GOOD[:20]), ("tls", GOOD[:9]), ("http", GET[:9])])
def test_known_protocols_are_never_released(mode: Mode, data: bytes) -> None:
    """Bytes of TLS, and of TLS or HTTP ports, are never released early."""
    inspected = Inspector(mode, NAME, denied)
    assert (inspected.from_client(data), inspected.release()) == (b"", b"")
    assert inspected.held == len(data)


def test_a_long_text_is_released() -> None:
    """A first line above 8 KiB that is no HTTP request passes."""
    data = b"word " * 1640
    assert verdict("any", data + b"x" * 10) == ("", data + b"x" * 10)
    inspected = Inspector("any", NAME, denied)
    assert inspected.from_client(data) == data


def test_a_websocket_works_on_every_port() -> None:
    """A WebSocket handshake works on a port of any protocol."""
    inspected = Inspector("any", NAME, denied)
    handshake = GET[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    assert inspected.from_client(handshake + b"x") == handshake
    assert (inspected.watches_server, inspected.held) == (True, 1)
    inspected.from_server(b"HTTP/1.1 101 Switching Protocols\r\n")
    assert (inspected.from_client(b""), inspected.transparent) == (b"x", True)


@pytest.mark.parametrize("mode", ["tls", "http", "any"])
def test_a_silent_client_is_accepted(mode: Mode) -> None:
    """A connection on which the client sends nothing ends without an error."""
    assert verdict(mode, b"") == ("", b"")


@given(mode=st.sampled_from(["tls", "http", "any"]), data=st.binary(max_size=300), size=st.integers(1, 300))
def test_random_bytes_give_bytes_or_an_error(mode: Mode, data: bytes, size: int) -> None:
    """Random bytes are forwarded or raise InspectionError."""
    run(mode, NAME, pieces(data, size))


@pytest.mark.parametrize("mode", ["tls", "http", "any"])
@pytest.mark.parametrize("data", [b"\x16\x03\x01\x40\x00" * BIG, b"GET /" * BIG, b"\x16\x03\x01\x00\x01\x01" * 100_000])
def test_endless_first_bytes_are_bounded(mode: Mode, data: bytes) -> None:
    """At most 64 KiB and one read are held without a verdict."""
    inspected, rule = Inspector(mode, NAME, denied), ""
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


@given(
    switches=st.integers(0, 255),
    start=st.sampled_from([b"", GOOD, SSL_REQUEST, GET, hello(sni(b"b.example"))]),
    at=st.integers(0, 120),
    data=st.binary(max_size=20),
)
def test_any_bytes_keep_the_promises(switches: int, start: bytes, at: int, data: bytes) -> None:
    """The verdict on any first bytes does not depend on how they are cut."""
    one_input(bytes([switches]) + start[:at] + data + start[at + len(data) :])
