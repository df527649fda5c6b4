"""Promises of the inspection of first bytes: which names pass, and which protocols are recognised."""

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
from x07_sandbox.network.first_bytes import InspectionError, Inspector

Mode = Literal["tls", "http", "any"]
GOOD: Final = hello(sni(b"a.example"))
NAMELESS: Final = hello(extension(43, b"\x02\x03\x04"))
SSL_REQUEST: Final = bytes.fromhex("00000008 04d2162f")
GSS_REQUEST: Final = bytes.fromhex("00000008 04d21630")
GET: Final = b"GET /x HTTP/1.1\r\nHost: a.example\r\n\r\n"
BIG: Final = 1 << 20


def verdict(mode: Mode, data: bytes, name: str | None = NAME, size: int = BIG) -> tuple[str, bytes]:
    """The rule that refuses some bytes ("" if none does), and what was forwarded."""
    found = run(mode, name, pieces(data, size))
    return found.rule, found.forwarded


def test_a_hello_with_the_name_opens_the_connection() -> None:
    """A hello with the listed name passes with all that follows it, and then nothing is inspected any more."""
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
    """A name in upper case or with a final dot is the same name (attack 50)."""
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
def test_a_tls_port_takes_only_the_listed_name(data: bytes, rule: str, record: int, size: int) -> None:
    """Other names, no name, two names, addresses and other protocols pass no byte of a TLS port (attacks 46 to 53)."""
    if record and data.startswith(b"\x16") and len(data) < 1000:
        data = records(data[5:], record)
    assert verdict("tls", data, size=size) == (rule, b"")


def test_a_stalled_hello_is_held() -> None:
    """A hello that never ends stays undecided and held, so that the gate's timer can end it (attack 52)."""
    inspected = Inspector("tls", NAME, denied)
    inspected.from_client(GOOD[:-1])
    assert (inspected.decided, inspected.held) == (False, len(GOOD) - 1)


def test_ech_passes_under_the_listed_name_only() -> None:
    """An encrypted ClientHello passes if the outer name is the listed one, and the inspector reports it."""
    ech = extension(0xFE0D, bytes(8))
    good = run("tls", NAME, [hello(sni(b"a.example"), ech)])
    assert good.rule == ""
    assert verdict("tls", hello(sni(b"b.example"), ech)) == ("tls:other-name", b"")
    assert verdict("tls", hello(ech)) == ("tls:no-sni", b"")


def test_literal_addresses_need_no_name() -> None:
    """A connection to a literal address may be without a name, and may not name what is denied, or an address."""
    for data in (NAMELESS, hello(sni(b"b.example"))):
        assert verdict("tls", data, None) == ("", data)
    assert verdict("tls", hello(sni(DENIED.upper().encode())), None) == ("name:denied", b"")
    assert verdict("tls", hello(sni(b"192.0.2.7")), None) == ("tls:malformed", b"")


def test_an_error_tells_rule_reason_and_name() -> None:
    """A refusal names its rule and the name that was seen, with every odd character escaped, and it is final."""
    inspected = Inspector("tls", NAME, denied)
    with pytest.raises(InspectionError) as caught:
        inspected.from_client(hello(sni(b"B.example")))
    assert caught.value.rule == "tls:other-name"
    assert caught.value.name == inspected.tls_name == "b.example"
    assert caught.value.reason == "the TLS ClientHello names b.example, but the connection was opened for a.example"
    with pytest.raises(InspectionError) as again:
        inspected.from_client(GOOD)
    assert again.value is caught.value
    odd = run("tls", NAME, [hello(sni(b"\x1b[2J\n" + b"x" * 1000))])
    assert odd.reason.isprintable()
    assert len(odd.reason) < 400


@pytest.mark.parametrize("name", [NAME, None])
def test_real_hellos_pass_on_every_port(name: str | None) -> None:
    """What this Python's TLS library sends first passes on a TLS port and on a port of any protocol."""
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
    """On a port of any protocol everything but TLS and HTTP passes, as soon as it can be neither."""
    inspected = Inspector("any", NAME, denied)
    out = b"".join(inspected.from_client(piece) for piece in pieces(data, size))
    assert out == data
    assert (inspected.decided, inspected.transparent, inspected.held) == (True, True, 0)


@pytest.mark.parametrize("data", [b"GET ", b"hello", b"\x16", b"\x00\x00\x00\x08\x04", b"\r\n", b"EHLO a b c"])
def test_an_open_start_waits_and_passes_at_its_end(data: bytes) -> None:
    """Bytes that can still become TLS or HTTP are held; if the client stops there, they are neither, and pass."""
    inspected = Inspector("any", NAME, denied)
    assert inspected.from_client(data) == b""
    assert (inspected.decided, inspected.held) == (False, len(data))
    inspected.client_eof()
    assert inspected.from_client(b"") == data
    assert inspected.transparent


@pytest.mark.parametrize("prelude", [b"", SSL_REQUEST, GSS_REQUEST, GSS_REQUEST + SSL_REQUEST])
@pytest.mark.parametrize("size", [1, BIG])
def test_tls_is_checked_on_every_port(prelude: bytes, size: int) -> None:
    """On a port of any protocol a hello with another name does not pass, also after PostgreSQL's SSLRequest."""
    assert verdict("any", prelude + GOOD, size=size) == ("", prelude + GOOD)
    assert verdict("any", prelude + NAMELESS, size=size) == ("", prelude + NAMELESS)
    rule, out = verdict("any", prelude + hello(sni(b"b.example")), size=size)
    assert rule == "tls:other-name"
    assert prelude.startswith(out)


def test_an_ssl_request_is_forwarded_at_once() -> None:
    """PostgreSQL's SSLRequest gets its answer; what the client says then is judged as the first bytes are."""
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
    """On a port of any protocol requests for another host do not pass, nor requests in an odd form."""
    found, out = verdict("any", data, size=size)
    assert found == rule
    assert b"b.example" not in out
    assert rule or out == data


def test_an_unfinished_line_may_go_ahead() -> None:
    """Text that waits for its line to end can be released, each byte once, and other protocols lose nothing by it."""
    inspected = Inspector("any", NAME, denied)
    assert (inspected.from_client(b"HE"), inspected.release(), inspected.release()) == (b"", b"HE", b"")
    assert (inspected.held, inspected.decided) == (0, False)
    assert (inspected.from_client(b"L"), inspected.release()) == (b"", b"L")
    assert inspected.from_client(b"O me\r\nmore") == b"O me\r\nmore"
    assert inspected.transparent


@pytest.mark.parametrize("size", [1, 3, 7])
def test_a_request_that_went_ahead_is_judged(size: int) -> None:
    """A request whose line was released is judged like any other: nothing of its head passes with another Host."""
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


def test_a_byte_that_may_begin_anything_goes_ahead() -> None:
    """One byte of a start that is still open is released; the hello or SSLRequest that follows is judged as ever."""
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


def test_a_rewritten_request_cannot_follow_what_went_ahead() -> None:
    """A released beginning that is not how the request is written again ends the connection."""
    inspected = Inspector("any", NAME, denied)
    absolute = b"GET http://a.example/x HTTP/1.1\r\nHost: a.example\r\n\r\n"
    assert inspected.from_client(absolute[:8]) + inspected.release() == b"GET http"
    with pytest.raises(InspectionError) as told:
        inspected.from_client(absolute[8:])
    assert told.value.rule == "http:malformed"


@pytest.mark.parametrize(("mode", "data"), [("any", GOOD[:20]), ("tls", GOOD[:9]), ("http", GET[:9])])
def test_only_text_of_no_known_protocol_goes_ahead(mode: Mode, data: bytes) -> None:
    """Nothing of a hello, or of a port that has to be TLS or HTTP, is released before it is judged."""
    inspected = Inspector(mode, NAME, denied)
    assert (inspected.from_client(data), inspected.release()) == (b"", b"")
    assert inspected.held == len(data)


def test_a_long_text_is_not_held_for_ever() -> None:
    """A first line of more than 8 KiB that has no target of HTTP passes."""
    data = b"word " * 1640
    assert verdict("any", data + b"x" * 10) == ("", data + b"x" * 10)
    inspected = Inspector("any", NAME, denied)
    assert inspected.from_client(data) == data


def test_a_websocket_works_on_every_port() -> None:
    """A WebSocket handshake on a port of any protocol is checked, and becomes transparent, as on an HTTP port."""
    inspected = Inspector("any", NAME, denied)
    handshake = GET[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    assert inspected.from_client(handshake + b"x") == handshake
    assert (inspected.watches_server, inspected.held) == (True, 1)
    inspected.from_server(b"HTTP/1.1 101 Switching Protocols\r\n")
    assert (inspected.from_client(b""), inspected.transparent) == (b"x", True)


@pytest.mark.parametrize("mode", ["tls", "http", "any"])
def test_a_client_that_says_nothing_is_fine(mode: Mode) -> None:
    """A connection on which the client sends nothing can end without an error."""
    assert verdict(mode, b"") == ("", b"")


@given(mode=st.sampled_from(["tls", "http", "any"]), data=st.binary(max_size=300), size=st.integers(1, 300))
def test_random_bytes_give_bytes_or_an_error(mode: Mode, data: bytes, size: int) -> None:
    """Random bytes give bytes or InspectionError, nothing else."""
    run(mode, NAME, pieces(data, size))


@pytest.mark.parametrize("mode", ["tls", "http", "any"])
@pytest.mark.parametrize("data", [b"\x16\x03\x01\x40\x00" * BIG, b"GET /" * BIG, b"\x16\x03\x01\x00\x01\x01" * 100_000])
def test_endless_first_bytes_are_bounded(mode: Mode, data: bytes) -> None:
    """However much a client sends without a verdict, no more than 64 KiB and one read are held."""
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
    """Random bytes in first bytes, cut anywhere, give the same verdict."""
    one_input(bytes([switches]) + start[:at] + data + start[at + len(data) :])
