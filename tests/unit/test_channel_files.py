"""Requests about files: answers survive, and any other bytes of a guest raise PeerError."""

from __future__ import annotations

import json
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x07_sandbox.channel import files
from x07_sandbox.channel.files import ENTRIES_MAX, MESSAGE_MAX, Answer, Buffer, FileInfo, Request, answer_of, encode
from x07_sandbox.errors import PeerError

COUNTS: Final = st.integers(0, 2**63 - 1)
NAMES: Final = st.text(st.characters(exclude_characters="\0"), max_size=20)  # with lone surrogates
INFOS: Final = st.builds(FileInfo, NAMES, st.integers(0, 0o177777), COUNTS, st.integers(-(2**63) + 1, 2**63 - 1), NAMES)
ANSWERS: Final = st.builds(Answer, st.integers(0, 4096), COUNTS, st.lists(INFOS, max_size=3).map(tuple))
GOOD: Final = [0, 3, [["a", 0o100644, 3, -1, ""]]]


def taken(wire: bytes, cut: int) -> list[list[object]]:
    """The messages in bytes that arrive in pieces of a size."""
    buffer = Buffer()
    found = []
    for at in range(0, len(wire), cut):
        buffer.data += wire[at : at + cut]
        while (values := buffer.take()) is not None:
            found.append(values)
    return found


@given(st.lists(ANSWERS, max_size=4), st.integers(1, 50))
def test_answers_come_back_as_they_were(answers: list[Answer], cut: int) -> None:
    """Every valid answer survives, with undecodable names, however the bytes are cut."""
    wire = b"".join(map(encode, answers))
    assert [answer_of(values) for values in taken(wire, cut)] == answers


@given(st.builds(Request, st.sampled_from([files.READ, files.PUT]), NAMES, COUNTS, COUNTS, COUNTS, st.booleans()))
def test_requests_come_back_as_they_were(request: Request) -> None:
    """Every request survives."""
    assert [Request(*values) for values in taken(encode(request), 7)] == [request]  # type: ignore[arg-type]


def test_content_follows_its_message() -> None:
    """Bytes behind a message stay in the buffer, and are taken in pieces."""
    buffer = Buffer()
    buffer.data += encode(Answer(0, 5)) + b"hello"
    assert buffer.take() == [0, 5, []]
    assert [buffer.piece(3), buffer.piece(9), buffer.piece(1)] == [b"hel", b"lo", b""]


@given(st.binary(max_size=100), st.integers(1, 20))
def test_any_bytes_are_messages_or_a_peer_error(junk: bytes, cut: int) -> None:
    """Any bytes yield answers or PeerError, and an oversized message is rejected before it arrives."""
    for wire in (junk, len(junk).to_bytes(4, "big") + junk):
        try:
            for values in taken(wire, cut):
                answer_of(values)
        except PeerError:
            continue


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | NAMES, st.lists, max_leaves=12))
def test_any_json_is_an_answer_or_a_peer_error(value: object) -> None:
    """Any JSON value yields an answer or PeerError."""
    text = json.dumps(value).encode()
    try:
        for values in taken(len(text).to_bytes(4, "big") + text, 9):
            answer_of(values)
    except PeerError:
        return


@pytest.mark.parametrize(
    "values",
    [
        [],
        GOOD[:2],
        [*GOOD, 0],
        [-1, 0, []],
        [4097, 0, []],
        [True, 0, []],
        [0.0, 0, []],
        [0, -1, []],
        [0, 2**63, []],
        [0, "3", []],
        [0, 0, {}],
        [0, 0, [[]]],
        [0, 0, ["abcde"]],
        [0, 0, [["a", 1, 1, 1]]],
        [0, 0, [[1, 1, 1, 1, ""]]],
        [0, 0, [["a\0", 1, 1, 1, ""]]],
        [0, 0, [["a" * 4097, 1, 1, 1, ""]]],
        [0, 0, [["a", -1, 1, 1, ""]]],
        [0, 0, [["a", 1, 1, 2**63, ""]]],
        [0, 0, [["a", 1, 1, 1, None]]],
        [0, 0, [GOOD] * (ENTRIES_MAX + 1)],
    ],
    ids=range(21),
)
def test_a_malformed_answer_is_rejected(values: list[object]) -> None:
    """An answer with other fields, wrong types or values out of bounds is rejected."""
    assert answer_of(GOOD) == Answer(0, 3, (FileInfo("a", 0o100644, 3, -1, ""),))
    with pytest.raises(PeerError):
        answer_of(values)


@pytest.mark.parametrize("text", [b"{}", b"1", b"null", b"[", b"[" * 5000, b"\xff\xfe", b"[" + b"9" * 9000 + b"]"])
def test_malformed_json_is_rejected(text: bytes) -> None:
    """Bytes that are no JSON array are rejected."""
    with pytest.raises(PeerError):
        taken(len(text).to_bytes(4, "big") + text, 4096)


def test_an_oversized_message_is_rejected_before_it_arrives() -> None:
    """A message over its bound is rejected by its length."""
    buffer = Buffer()
    buffer.data += (MESSAGE_MAX + 1).to_bytes(4, "big")
    with pytest.raises(PeerError):
        buffer.take()
