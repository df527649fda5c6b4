"""Frames: any bytes, however they are cut, yield whole frames or PeerError."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from x07_sandbox.channel.frames import (
    BODIES,
    CONTROL_MAX,
    DATA_MAX,
    HEADER,
    LAST_FILE,
    PACKED,
    SENDER,
    START_MAX,
    Frame,
    Kind,
    Role,
    Shape,
    Stream,
    decode_body,
    encode,
    encode_body,
    frame_sender,
    payload_max,
    stream_sender,
    take_frame,
)
from x07_sandbox.errors import PeerError

ROLES = st.sampled_from(Role)
CONTROL = sorted(SENDER)
STREAMS = {role: [s for s in range(LAST_FILE + 2) if stream_sender(s) is role] for role in Role}
DEPTH = 5000  # deeper than the decoder accepts, and small enough for a control frame
HOSTILE = {
    "empty": b"",
    "no text": b"\xff\xfe",
    "byte order mark": b'\xef\xbb\xbf{"nonce":""}',
    "no JSON": b"{",
    "two values": b"{}{}",
    "list": b"[]",
    "null": b"null",
    "deep lists": b"[" * DEPTH + b"]" * DEPTH,
    "deep objects": b'{"a":' * DEPTH,
    "deep in a field": b'{"nonce":' + b"[" * DEPTH + b"]" * DEPTH + b"}",
}


def frames(sender: Role) -> st.SearchStrategy[Frame]:
    """Any frame that this role may send; its payload is arbitrary."""
    control = st.sampled_from([kind for kind in CONTROL if SENDER[kind] is sender]).map(lambda kind: (kind, 0))
    taken = st.sampled_from(STREAMS[Role.GUEST if sender is Role.HOST else Role.HOST])
    sent = st.sampled_from(STREAMS[sender])
    head = control | st.tuples(st.sampled_from([Kind.DATA, Kind.EOF]), sent) | st.tuples(st.just(Kind.CREDIT), taken)

    def with_payload(pair: tuple[Kind, int]) -> st.SearchStrategy[Frame]:
        return st.builds(Frame, st.just(pair[0]), st.just(pair[1]), st.binary(max_size=min(64, payload_max(pair[0]))))

    return head.flatmap(with_payload)


def take_all(stream: bytes, cuts: list[int], sender: Role) -> tuple[list[Frame], PeerError | None, int]:
    """Frames, error and number of remaining bytes for a stream that arrives in pieces."""
    buf = bytearray()
    found: list[Frame] = []
    at = 0
    turn = 0
    while at < len(stream):
        size = cuts[turn % len(cuts)] if cuts else len(stream)
        buf += stream[at : at + size]
        at += size
        turn += 1
        try:
            while (frame := take_frame(buf, sender)) is not None:
                found.append(frame)
        except PeerError as exc:
            return found, exc, len(buf)
    return found, None, len(buf)


def good_body(kind: Kind) -> dict[str, Any]:
    """A body that the table accepts."""
    return {
        key: {"text": "x" * shape.lo, "bytes": b"x" * shape.lo, "int": max(shape.lo, 0), "bool": True, "any": []}[
            shape.kind
        ]
        for key, shape in BODIES[kind].items()
    }


def values(shape: Shape) -> st.SearchStrategy[object]:
    """Every value that a shape accepts; for "any", some JSON."""
    taken = {
        "int": st.integers(shape.lo, shape.hi),
        "text": st.text(
            st.characters(exclude_categories=["Cs"]), min_size=shape.lo, max_size=min(shape.hi, shape.lo + 64)
        ),
        "bytes": st.binary(min_size=shape.lo, max_size=shape.hi),
        "bool": st.booleans(),
        "any": st.none()
        | st.lists(st.text(max_size=8), max_size=3)
        | st.dictionaries(st.text(max_size=8), st.integers()),
    }[shape.kind]
    return st.none() | taken if shape.optional else taken


BODY = st.sampled_from(CONTROL).flatmap(
    lambda kind: st.tuples(
        st.just(kind), st.fixed_dictionaries({key: values(shape) for key, shape in BODIES[kind].items()})
    )
)


@given(
    ROLES.flatmap(lambda role: st.tuples(st.just(role), st.lists(frames(role), max_size=6))),
    st.lists(st.integers(1, 90), max_size=4),
)
def test_frames_come_out_as_they_went_in_however_they_are_cut(sent: tuple[Role, list[Frame]], cuts: list[int]) -> None:
    """Frames survive the channel unchanged, however the byte stream is cut."""
    role, written = sent
    stream = b"".join(encode(frame.kind, frame.stream, frame.payload) for frame in written)
    assert take_all(stream, cuts, role) == (written, None, 0)


@pytest.mark.parametrize("kind", Kind)
def test_a_frame_is_read_whole_byte_by_byte_and_with_more_behind_it(kind: Kind) -> None:
    """A frame is returned once it is complete and consumes no byte of the next one."""
    stream = 0 if kind in SENDER else Stream.STDOUT
    payload = b"\0" * min(5, payload_max(kind))
    sender = frame_sender(kind, stream)
    assert sender is not None
    wire = encode(kind, stream, payload)
    frame = Frame(kind, stream, payload)
    buf = bytearray(wire)
    assert (take_frame(buf, sender), bytes(buf)) == (frame, b"")
    buf = bytearray()
    for byte in wire[:-1]:
        buf.append(byte)
        assert take_frame(buf, sender) is None
    buf.append(wire[-1])
    assert (take_frame(buf, sender), bytes(buf)) == (frame, b"")
    buf = bytearray(wire + b"\xff\xff")
    assert (take_frame(buf, sender), bytes(buf)) == (frame, b"\xff\xff")


@given(st.binary(max_size=200), st.lists(st.integers(1, 20), min_size=1, max_size=4), ROLES)
@example(b"\xff\xff\xff\xff\x04\x00\x00\x00", [1], Role.GUEST)
def test_junk_gives_frames_or_a_peer_error(junk: bytes, cuts: list[int], sender: Role) -> None:
    """Any bytes yield frames or PeerError, and the same ones for any cut."""
    cut, whole = take_all(junk, cuts, sender), take_all(junk, [], sender)
    assert cut[0] == whole[0]
    assert (cut[1] and cut[1].args) == (whole[1] and whole[1].args)


@given(
    st.tuples(
        st.integers(0, 2**32 - 1),
        st.sampled_from([*Kind, 0, 12, 255]),
        st.sampled_from([0, 0, 1]),
        st.integers(0, 2**16 - 1),
    ),
    ROLES,
)
def test_a_bad_header_is_refused_before_its_payload_comes(header: tuple[int, int, int, int], sender: Role) -> None:
    """An invalid header is rejected before any of its payload is buffered."""
    length, number, reserved, stream = header
    good = (
        number in set(Kind)
        and not reserved
        and length <= payload_max(Kind(number))
        and frame_sender(Kind(number), stream) is sender
    )
    buf = bytearray(HEADER.pack(length, number, reserved, stream))
    before = bytes(buf)
    if not good:
        with pytest.raises(PeerError):
            take_frame(buf, sender)
        assert buf == before
    elif length:
        assert take_frame(buf, sender) is None
        assert buf == before
    else:
        assert take_frame(buf, sender) == Frame(Kind(number), stream, b"")


@pytest.mark.parametrize("kind", Kind)
def test_a_frame_over_its_bound_is_not_sent(kind: Kind) -> None:
    """Encoding a payload over the limit is an error."""
    most = payload_max(kind)
    assert len(encode(kind, 1, bytes(most))) == HEADER.size + most
    with pytest.raises(ValueError, match="over"):
        encode(kind, 1, bytes(most + 1))


def test_guest_frames_are_small() -> None:
    """No frame from the guest is larger than a data frame."""
    assert CONTROL_MAX < DATA_MAX < START_MAX
    large = [kind for kind in Kind if payload_max(kind) > DATA_MAX]
    assert large == [Kind.START]
    assert SENDER[Kind.START] is Role.HOST


def test_every_stream_has_one_sender_or_none() -> None:
    """Each stream has one sender, and unknown streams have none."""
    assert STREAMS[Role.HOST] == [Stream.STDIN, *range(Stream.FIRST_FILE, LAST_FILE + 1)]
    outputs = [Stream.STDOUT, Stream.STDERR, Stream.OUTPUT_FILE]
    assert STREAMS[Role.GUEST] == [*outputs, Stream.CHANGES, Stream.LEFT_FILES]
    assert stream_sender(Stream.CONTROL) is None


@pytest.mark.parametrize("stream", [*range(18), LAST_FILE, LAST_FILE + 1, 2**16 - 1])
def test_credit_flows_against_the_data(stream: int) -> None:
    """Only the receiver of a stream may grant credit for it."""
    pair = {frame_sender(Kind.DATA, stream), frame_sender(Kind.CREDIT, stream)}
    assert pair == ({None} if stream_sender(stream) is None else {Role.HOST, Role.GUEST})
    assert frame_sender(Kind.EOF, stream) is stream_sender(stream)


@given(BODY)
def test_control_bodies_come_back_as_they_were(sent: tuple[Kind, dict[str, Any]]) -> None:
    """Every valid control body survives encoding and decoding."""
    kind, body = sent
    assert decode_body(kind, encode_body(kind, body)) == body


def test_undecodable_arguments_survive() -> None:
    """Arguments and environment that are not UTF-8 reach the agent unchanged."""
    argv = [b"\xff\x80".decode("utf-8", "surrogateescape"), "\u00e9\N{PILE OF POO}"]
    body = {**good_body(Kind.START), "argv": argv, "env": {argv[0]: argv[0]}}
    decoded = decode_body(Kind.START, encode_body(Kind.START, body))
    assert (decoded["argv"], decoded["env"]) == (argv, {argv[0]: argv[0]})


@given(st.sampled_from(CONTROL), st.binary(max_size=80))
def test_any_payload_is_a_body_or_a_peer_error(kind: Kind, payload: bytes) -> None:
    """Any control payload yields a body with exactly the known keys, or PeerError."""
    try:
        body = decode_body(kind, payload)
    except PeerError:
        return
    assert body.keys() == BODIES[kind].keys()


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", [Kind.HELLO, Kind.EXITED])
def test_malformed_json_is_rejected(kind: Kind, name: str) -> None:
    """Malformed, deeply nested or non-object JSON is rejected with PeerError."""
    with pytest.raises(PeerError):
        decode_body(kind, HOSTILE[name])


@pytest.mark.parametrize(
    "value",
    [
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "1.0",
        "true",
        "null",
        '"0"',
        "[]",
        "{}",
        "-1",
        "9" * 4000,
        "9" * 9000,
        "65536",
    ],
)
def test_a_number_is_a_whole_number_in_its_range(value: str) -> None:
    """Only an integer within its range is accepted as a number."""
    body = {**good_body(Kind.EXITED), "wait_status": 0}
    payload = encode_body(Kind.EXITED, body).replace(b'"wait_status":0', b'"wait_status":' + value.encode())
    assert payload != encode_body(Kind.EXITED, body)
    with pytest.raises(PeerError):
        decode_body(Kind.EXITED, payload)


@pytest.mark.parametrize("value", [1, None, [], {}, "x" * 65, "\ud800" * 3, "x" + "\udfff", True])
def test_a_text_is_a_text_of_its_length(value: object) -> None:
    """Only valid text within its length limits is accepted as text."""
    body = {**good_body(Kind.FAILED), "stage": value}
    with pytest.raises(PeerError, match="stage"):
        decode_body(Kind.FAILED, json.dumps(body).encode())


@given(st.sampled_from(sorted(PACKED)), st.binary(max_size=200))
def test_a_packed_body_has_its_length_and_no_other(kind: Kind, payload: bytes) -> None:
    """A packed body of the wrong length is rejected."""
    if len(payload) == PACKED[kind].size:
        try:
            assert decode_body(kind, payload).keys() == BODIES[kind].keys()
        except PeerError as exc:
            assert "out of range" in exc.why  # noqa: PT017 - the other promise
    else:
        with pytest.raises(PeerError):
            decode_body(kind, payload)


def test_a_packed_record_is_as_long_as_its_fields() -> None:
    """The size of a packed record is the sum of its fields."""
    for kind, layout in PACKED.items():
        shapes = list(BODIES[kind].values())
        assert {shape.kind for shape in shapes} <= {"int", "bytes"}
        assert layout.size == sum(8 if shape.kind == "int" else shape.hi for shape in shapes)
        assert payload_max(kind) == layout.size


@pytest.mark.parametrize("value", [0, 1, "true", None, []])
def test_a_boolean_is_a_boolean(value: object) -> None:
    """Numbers, text and null are not accepted as booleans."""
    with pytest.raises(PeerError, match="stopped"):
        decode_body(Kind.EXITED, encode_body(Kind.EXITED, {**good_body(Kind.EXITED), "stopped": value}))


@pytest.mark.parametrize("kind", [kind for kind in CONTROL if kind not in PACKED])
def test_keys_are_exactly_those_of_the_table(kind: Kind) -> None:
    """A body with an extra, missing or duplicate key is rejected."""
    body = good_body(kind)
    assert decode_body(kind, encode_body(kind, body)) == body
    with pytest.raises(PeerError):
        decode_body(kind, encode_body(kind, {**body, "more": 1}))
    for key in body:
        with pytest.raises(PeerError):
            decode_body(kind, encode_body(kind, {name: value for name, value in body.items() if name != key}))
        twice = encode_body(kind, body)[:-1] + b"," + encode_body(kind, {key: body[key]})[1:]
        with pytest.raises(PeerError):
            decode_body(kind, twice)


def test_every_guest_field_is_bounded() -> None:
    """Every field of a guest's frame has a type and bounds."""
    unbounded = {(kind, key) for kind in CONTROL for key, shape in BODIES[kind].items() if shape.kind == "any"}
    assert {kind for kind, _ in unbounded} == {Kind.START, Kind.WARM}
    assert all(SENDER[kind] is Role.HOST for kind, _ in unbounded)
    texts = [shape for kind in CONTROL for shape in BODIES[kind].values() if shape.kind == "text"]
    assert texts
    assert all(shape.hi <= CONTROL_MAX for shape in texts)


def test_the_largest_honest_body_fits_its_frame() -> None:
    """The largest valid guest report fits into one frame."""
    for kind in CONTROL:
        if SENDER[kind] is Role.GUEST and kind not in PACKED:
            body = {
                key: "\u00e9" * shape.hi if shape.kind == "text" else shape.hi if shape.kind == "int" else True
                for key, shape in BODIES[kind].items()
            }
            assert len(encode_body(kind, body)) <= CONTROL_MAX
