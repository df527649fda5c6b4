"""Fuzz target: the inspection of HTTP requests, whatever a client sends and a far end answers.

An input is a byte of switches and the client's bytes:

    bit 7        1: the far end accepts a WebSocket handshake; 0: it answers with status 400
    bit 6        1: the connection is for a literal address; 0: for NAME
    bits 0 to 5  N cuts the bytes into pieces of N + 1 bytes

Invariants:

* only bytes or InspectionError come out, and after an InspectionError always the same one;
* the verdict and the forwarded requests do not depend on the cut;
* forwarded bytes, up to an accepted handshake, are requests in the strictest form, each with one Host, which is NAME,
  one body length, and a path or "*" as its target;
* forwarded bytes pass a second inspection unchanged;
* at most 64 KiB and one read are held.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

from tests.fuzz.fuzz_client_hello import ADDRESS, NAME, check_sticky, corpus, denied, pieces
from x07_sandbox.network.first_bytes import HELD_MAX, Inspector
from x07_sandbox.network.protocols import InspectionError

if TYPE_CHECKING:
    from x07_sandbox.network.hosts import Host

LINE: Final = re.compile(rb"([!-~]+) (/[!-~]*|\*) HTTP/1\.[01]")
FIELD: Final = re.compile(rb"([!-9;-~]+): ([^\x00-\x08\x0a-\x1f\x7f]*)")
HOST: Final = re.compile(rb"a\.example\.?(:80)?", re.IGNORECASE)
CHUNK: Final = re.compile(rb"([0-9a-f]+)\r\n")


class Outcome(NamedTuple):
    """The verdict on some bytes: forwarded requests, then forwarded raw bytes, then the rule that was broken."""

    requests: bytes
    raw: bytes
    rule: str


class Parsed(NamedTuple):
    """Requests in strict form. heads: each with its body, chunks joined. left: the incomplete rest."""

    requests: list[tuple[bytes, bytes]]
    left: bytes


def play(parts: list[bytes], host: Host, answer: bytes) -> Outcome:
    """Feed the parts to an inspector; the far end answers a handshake in pieces of one byte."""
    inspected = Inspector("http", host, 80, denied)
    requests, raw = b"", b""
    try:
        for part in parts:
            forwarded = inspected.from_client(part)
            raw, requests = (raw + forwarded, requests) if inspected.transparent else (raw, requests + forwarded)
            assert inspected.held <= HELD_MAX + len(part)
            watched = inspected.watches_server
            for byte in pieces(answer, 1) if watched else []:
                inspected.from_server(byte)
            assert not inspected.watches_server
            released = inspected.from_client(b"")
            assert watched or not released
            raw, requests = (raw + released, requests) if inspected.transparent else (raw, requests + released)
        inspected.client_eof()
    except InspectionError as exc:
        check_sticky(inspected, exc)
        return Outcome(requests, raw, exc.rule)
    return Outcome(requests, raw, "")


def parse(data: bytes, *, named: bool) -> Parsed:
    """Read strict requests. Raises AssertionError for any other bytes."""
    found: list[tuple[bytes, bytes]] = []
    left = data
    while left:
        head, blank, rest = left.partition(b"\r\n\r\n")
        assert blank, "part of a head was forwarded"
        line, *lines = head.split(b"\r\n")
        assert LINE.fullmatch(line), line
        fields = [match.groups() for text in lines if (match := FIELD.fullmatch(text))]
        assert len(fields) == len(lines)
        by_name = {key.lower(): value for key, value in fields}
        hosts = [value for key, value in fields if key.lower() == b"host"]
        lengths = [value for key, value in fields if key.lower() in {b"content-length", b"transfer-encoding"}]
        assert len(hosts) == 1
        assert not named or HOST.fullmatch(hosts[0]), hosts
        assert len(lengths) <= 1
        body: tuple[bytes, bytes] | None = (b"", rest)
        if b"transfer-encoding" in by_name:
            body = chunks(rest)
        elif b"content-length" in by_name:
            length = int(by_name[b"content-length"])
            body = (rest[:length], rest[length:]) if len(rest) >= length else None
        if body is None:
            return Parsed(found, left)
        found.append((head, body[0]))
        left = body[1]
    return Parsed(found, b"")


def chunks(data: bytes) -> tuple[bytes, bytes] | None:
    """Join the chunks and the trailer at the start of some bytes; None if they are incomplete."""
    joined = b""
    while True:
        if not data:
            return None
        match = CHUNK.match(data)
        assert match, data[:40]
        size = int(match[1], 16)
        data = data[match.end() :]
        if not size:
            trailer, end, data = (b"", data[:2], data[2:]) if data[:2] == b"\r\n" else data.partition(b"\r\n\r\n")
            assert end
            return joined + b"\r\n" + trailer, data
        assert data[size : size + 2] == b"\r\n"
        joined += data[:size]
        data = data[size + 2 :]


def seeds() -> dict[str, bytes]:
    """Return requests as programs send them, and those of the differential fuzzer."""
    refused, accepted, literal = b"\x06", b"\x86", b"\x46"
    host = b" HTTP/1.1\r\nHost: a.example\r\n"
    get, chunked = b"GET /x" + host + b"\r\n", b"POST /x" + host + b"Transfer-Encoding: chunked\r\n\r\n"
    return {
        **{name: refused + data for name, data in corpus().items()},
        "absolute": refused + b"GET http://A.Example?x" + host + b"\r\n",
        "absolute-other": refused + b"GET http://b.example/" + host + b"\r\n",
        "trailer-host": refused + chunked + b"0\r\nHost: b.example\r\n\r\n",
        "chunked": refused + chunked + b"3;x=y\r\nabc\r\n0A\r\n0123456789\r\n0\r\nDigest: x\r\n\r\n" + get,
        "chunk-footer": refused + chunked + b"3\r\nabcGET / HTTP/1.1\r\n",
        "folded": refused + get[:-2] + b"X: y\r\n z\r\n\r\n",
        "websocket": accepted + get[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n\x81\x05hello",
        "literal": literal + get.replace(b"a.example", b"[2001:db8::1]:80") + get.replace(b"a.", b"denied."),
    }


def one_input(data: bytes) -> None:
    """Check one input. Raises AssertionError, or any exception that the code under test must not raise."""
    if not data:
        return
    answer = b"HTTP/1.1 101 Switching\r\n" if data[0] & 0x80 else b"HTTP/1.1 400 Bad\r\n"
    host = ADDRESS if data[0] & 0x40 else NAME
    parts = pieces(data[1:], (data[0] & 0x3F) + 1)
    cut, whole, bytewise = (play(cut, host, answer) for cut in (parts, [data[1:]], pieces(data[1:], 1)))
    assert cut.rule == whole.rule == bytewise.rule
    found = [parse(outcome.requests, named=host == NAME) for outcome in (bytewise, cut, whole)]
    if whole.rule:  # nothing of one read is forwarded if a part of it is refused
        assert found[0].requests[: len(found[1].requests)] == found[1].requests
    else:
        assert [parsed.requests for parsed in found[1:]] == [found[0].requests] * 2
        assert cut.raw == whole.raw == bytewise.raw
    again = play([bytewise.requests], host, answer)
    assert again.requests == bytewise.requests or again.rule
    assert again.rule in {"", "http:malformed"}, again.rule  # its end can be inside a body
