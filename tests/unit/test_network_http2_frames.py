"""Inspection of HTTP/2 without TLS: which frames pass."""

from __future__ import annotations

import struct
from typing import Final

import pytest
from hpack import Encoder
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.fuzz_client_hello import ADDRESS, NAME, denied, pieces
from x07_sandbox.network.first_bytes import HELD_MAX, Inspector
from x07_sandbox.network.http_requests import PREFACE
from x07_sandbox.network.protocols import InspectionError

BIG: Final = 1 << 20
Fields = dict[str, str]
REQUEST: Final[Fields] = {":method": "POST", ":scheme": "http", ":path": "/x", ":authority": "a.example:50051"}


def frame(kind: int, payload: bytes = b"", stream: int = 0, flags: int = 0) -> bytes:
    """One frame."""
    return struct.pack("!I", len(payload))[1:] + bytes([kind, flags]) + struct.pack("!I", stream) + payload


def request(
    fields: Fields | list[tuple[str, str]], stream: int = 1, flags: int = 4, encoder: Encoder | None = None
) -> bytes:
    """A HEADERS frame, without the end of the stream."""
    rows = list(fields.items()) if isinstance(fields, dict) else fields
    return frame(1, (encoder or Encoder()).encode(rows), stream, flags)


SETTINGS: Final = frame(4, bytes.fromhex("0003 00000064 0004 00ffffff fe03 00000001"))
START: Final = PREFACE + SETTINGS
ACK: Final = frame(4, flags=1)
ANSWER: Final = frame(4, bytes.fromhex("0005 00004000"))


def opened() -> Inspector:
    """The inspector of a connection whose server has answered the preface."""
    inspected = Inspector("any", NAME, 50051, denied)
    assert inspected.from_client(START) == START
    inspected.from_server(ANSWER)
    return inspected


def rule_of(data: bytes, size: int = BIG) -> str:
    """The rule that refuses these bytes after the start, or "" if all of them pass."""
    inspected, out = opened(), b""
    try:
        for piece in pieces(data, size):
            out += inspected.from_client(piece)
    except InspectionError as exc:
        return exc.rule if data.startswith(out) and exc.reason.isprintable() else f"other bytes passed: {out!r}"
    assert (out, inspected.held, inspected.transparent) == (data, 0, False)
    return ""


@pytest.mark.parametrize("size", [1, BIG])
def test_requests_for_the_host_pass_unchanged(size: int) -> None:
    """A call as gRPC makes it, several requests on a connection and a trailer pass unchanged."""
    encoder = Encoder()
    call = {**REQUEST, "content-type": "application/grpc", "te": "trailers", "grpc-metadata-bin": "AAE"}
    data = (
        ACK
        + request(call, encoder=encoder)
        + frame(0, b"\0\0\0\0\1x", 1, 1)
        + request({**REQUEST, "content-length": "5"}, 3, encoder=encoder)
        + frame(8, bytes(3) + b"\1", 3)
        + frame(0, b"\2abc\0\0", 3, 8)
        + frame(0, b"ab", 3)
        + request({"x-checksum": "1"}, 3, 5, encoder)
        + frame(6, bytes(8))
        + frame(1, b"\1\0\0\0\0\5" + encoder.encode(list(REQUEST.items())) + b"\0", 5, 4 | 1 | 8 | 32)
        + frame(3, bytes(4), 5)
        + frame(7, bytes(8))
    )
    assert rule_of(data, size) == ""


@pytest.mark.parametrize("size", [1, BIG])
def test_a_block_of_several_frames_passes_when_it_is_complete(size: int) -> None:
    """The frames of a field block are held until the whole block is checked."""
    block = Encoder().encode(list(REQUEST.items()))
    first, second = frame(1, block[:5], 1), frame(9, block[5:], 1, 4)
    assert rule_of(first + second, size) == ""
    inspected = opened()
    assert (inspected.from_client(first), inspected.held) == (b"", len(first))
    assert rule_of(first + frame(6, bytes(8)) + second, size) == "http:malformed"
    other = Encoder().encode(list({**REQUEST, ":authority": "b.example:50051"}.items()))
    inspected = opened()
    assert inspected.from_client(frame(1, other[:5], 1)) == b""
    with pytest.raises(InspectionError, match=r"asks for b\.example"):
        inspected.from_client(frame(9, other[5:], 1, 4))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({":authority": "b.example:50051"}, "http:other-host"),
        ({"host": "b.example:50051"}, "http:other-host"),
        ({":authority": "a.example"}, "http:other-host"),
        ({"content_length": "3"}, "http:malformed"),
        ({":authority": "a.example:50051, b.example:50051"}, "http:malformed"),
        ({":authority": ""}, "http:malformed"),
        ({":method": "CONNECT"}, "http:connect"),
        ({":method": "GET /"}, "http:malformed"),
        ({":protocol": "websocket"}, "http:malformed"),
        ({":scheme": "https,x"}, "http:malformed"),
        ({":path": "http://b.example/"}, "http:malformed"),
        ({":path": "/ HTTP/1.1\r\nHost: b.example"}, "http:malformed"),
        ({":path": "*"}, "http:malformed"),
        ({"x": "1\r\nhost: b.example"}, "http:malformed"),
        ({"x\r\nhost": "b.example"}, "http:malformed"),
        ({"x:y": "1"}, "http:malformed"),
        ({"X": "1"}, "http:malformed"),
        ({"connection": "close"}, "http:malformed"),
        ({"transfer-encoding": "chunked"}, "http:malformed"),
        ({"content-length": "+3"}, "http:ambiguous-length"),
    ],
)
def test_requests_for_other_hosts_and_ambiguous_ones_are_refused(changes: Fields, rule: str) -> None:
    """A request for another host, or one that HTTP/1 would express differently, does not pass."""
    assert rule_of(request({**REQUEST, **changes})) == rule
    assert rule_of(request(REQUEST) + request({**REQUEST, **changes}, 3)) == rule


def test_a_host_field_replaces_a_missing_authority() -> None:
    """A request names its host in :authority or host, and at least in one of them."""
    without = {key: value for key, value in REQUEST.items() if key != ":authority"}
    assert rule_of(request({**without, "host": "a.example:50051"})) == ""
    assert rule_of(request(without)) == "http:no-host"
    assert rule_of(request([*REQUEST.items(), (":authority", "a.example:50051")])) == "http:malformed"
    assert rule_of(request([*without.items(), ("x", "1"), (":authority", "a.example:50051")])) == "http:malformed"
    assert (
        rule_of(request([*REQUEST.items(), ("content-length", "1"), ("content-length", "1")]))
        == "http:ambiguous-length"
    )
    literal = Inspector("any", ADDRESS, 50051, denied)
    literal.from_client(START)
    literal.from_server(ANSWER)
    assert literal.from_client(request({**REQUEST, ":authority": "192.0.2.7:50051"}))
    with pytest.raises(InspectionError):
        literal.from_client(request({**REQUEST, ":authority": "192.0.2.8"}, 3))


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (request({**REQUEST, "content-length": "3"}) + frame(0, b"abcd", 1), "http:ambiguous-length"),
        (request({**REQUEST, "content-length": "3"}) + frame(0, b"ab", 1, 1), "http:ambiguous-length"),
        (request({**REQUEST, "content-length": "3"}) + request({"x": "y"}, 1, 5), "http:ambiguous-length"),
        (request({**REQUEST, "content-length": "3"}, 1, 5), "http:ambiguous-length"),
        (request(REQUEST) + frame(0, b"", 1, 8), "http:malformed"),
        (request(REQUEST) + frame(0, b"\5abc", 1, 8), "http:ambiguous-length"),
        (request(REQUEST) + request(REQUEST, 1), "http:malformed"),
        (request(REQUEST) + request({"host": "b.example"}, 1, 5), "http:malformed"),
        (request(REQUEST) + request({"x": "y"}, 1), "http:malformed"),
        (request(REQUEST, 2), "http:malformed"),
        (frame(5, bytes(8), 1), "http:malformed"),
        (frame(9, bytes(8), 1), "http:malformed"),
        (frame(10), "http:malformed"),
        (frame(6, bytes(8))[:5] + b"\x80" + frame(6, bytes(8))[6:], "http:malformed"),
        (frame(1, b"\xff\xff\xff\xff\xff", 1, 4), "http:malformed"),
        (frame(1, b"\5", 1, 4 | 8), "http:malformed"),
        (frame(1, b"\0", 1, 4 | 32), "http:malformed"),
        (frame(4, bytes(BIG)), "http:too-large"),
        (frame(1, bytes(40_000), 1) + frame(9, bytes(40_000), 1), "http:too-large"),
        (b"".join(request({**REQUEST, "content-length": "3"}, 2 * n + 1) for n in range(1025)), "http:too-large"),
    ],
)
@pytest.mark.parametrize("size", [1, BIG])
def test_malformed_frames_do_not_pass(data: bytes, rule: str, size: int) -> None:
    """A frame that breaks the protocol, or a body with another length than it declares, ends the connection."""
    assert rule_of(data, size if len(data) < 10_000 else BIG) == rule


def test_binary_values_of_grpc_pass_if_the_server_takes_them() -> None:
    """A binary value, as gRPC sends it, passes only to a server that has announced that it takes such values."""
    data = request([*REQUEST.items(), ("trace-bin", "\0\r\n\1")])
    assert rule_of(data) == "http:malformed"
    assert grpc().from_client(data) == data
    for name, value in (("trace-bin", "\r\n"), ("trace", "\0\1")):
        with pytest.raises(InspectionError):
            grpc().from_client(request([*REQUEST.items(), (name, value)]))


def grpc() -> Inspector:
    """The inspector of a connection to a server of gRPC that takes binary values."""
    inspected = Inspector("any", NAME, 50051, denied)
    inspected.from_server(frame(4, bytes.fromhex("0005 00004000 fe03 00000001")))
    assert inspected.from_client(START) == START
    return inspected


@pytest.mark.parametrize("early", [1, 9, len(ANSWER)])
def test_a_server_may_speak_first(early: int) -> None:
    """A server's SETTINGS frame is a proof too if it arrives before the client's preface, whole or in part."""
    inspected = Inspector("any", NAME, 50051, denied)
    inspected.from_server(ANSWER[:early])
    out = inspected.from_client(START)
    inspected.from_server(ANSWER[early:])
    assert out + inspected.from_client(request(REQUEST)) == START + request(REQUEST)
    other = Inspector("any", NAME, 50051, denied)
    other.from_server(b"220 ready, an")
    with pytest.raises(InspectionError):
        other.from_client(START)


@pytest.mark.parametrize("size", [1, BIG])
def test_only_the_preface_passes_before_the_servers_proof(size: int) -> None:
    """Before the server's SETTINGS frame, only the preface and the client's SETTINGS pass."""
    inspected = Inspector("any", NAME, 50051, denied)
    out = b"".join(inspected.from_client(piece) for piece in pieces(START + request(REQUEST), size))
    assert (out, inspected.decided, inspected.watches_server) == (START, True, True)
    for byte in pieces(ANSWER, 1):
        inspected.from_server(byte)
    assert inspected.from_client(b"") == request(REQUEST)
    other = Inspector("any", NAME, 50051, denied)
    other.from_client(START)
    with pytest.raises(InspectionError, match="the server does not speak HTTP/2"):
        other.from_server(b"HTTP/1.1 400 Bad Request\r\n")
    endless = Inspector("any", NAME, 50051, denied)
    endless.from_client(START + bytes(HELD_MAX))
    with pytest.raises(InspectionError) as caught:
        endless.from_client(b"x")
    assert caught.value.rule == "first-bytes:too-large"


@pytest.mark.parametrize(
    "start",
    [
        PREFACE + frame(6, bytes(8)),
        PREFACE + frame(4, flags=1),
        PREFACE + frame(4, b"GET http://b.example/ HTTP/1.0\r\n" + bytes(4)),
        PREFACE + frame(4, bytes(6 * 33)),
        PREFACE + frame(4, bytes(5)),
    ],
)
def test_the_first_frame_contains_only_known_settings(start: bytes) -> None:
    """The frame that passes before the proof is a SETTINGS frame that contains no line of text."""
    inspected = Inspector("any", NAME, 50051, denied)
    with pytest.raises(InspectionError) as caught:
        inspected.from_client(start)
    assert caught.value.rule == "http:malformed"


def test_an_end_inside_a_frame_is_an_error() -> None:
    """A client may end its data only between two frames."""
    inspected = opened()
    inspected.from_client(request(REQUEST))
    inspected.client_eof()
    inspected.from_client(frame(0, b"abc", 1)[:-1])
    with pytest.raises(InspectionError, match="inside an HTTP/2 frame"):
        inspected.client_eof()


@given(data=st.binary(max_size=60), at=st.integers(0, 90), size=st.integers(1, 40))
def test_any_bytes_give_the_same_verdict_however_they_are_cut(data: bytes, at: int, size: int) -> None:
    """Any bytes pass or raise InspectionError, and the verdict does not depend on the cut."""
    good = request({**REQUEST, "content-length": "3"}) + frame(0, b"abc", 1, 1) + request(REQUEST, 3)
    stream = good[:at] + data + good[at:]
    verdicts = []
    for cut in (size, BIG):
        inspected, out, rule = opened(), b"", ""
        try:
            for piece in pieces(stream, cut):
                out += inspected.from_client(piece)
        except InspectionError as exc:
            rule = exc.rule
        assert stream.startswith(out)
        verdicts.append(rule)
    assert verdicts[0] == verdicts[1]
