"""Messages in the format of Protocol Buffers: any message survives, and any bytes give a message or an error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.fuzz_ttrpc import field, varint
from x07_sandbox.backends.protobuf import FIELDS_MAX, Message, encode

NUMBERS = st.integers(1, (1 << 29) - 1)
INTEGERS = st.integers(0, (1 << 64) - 1)


def test_the_examples_of_the_formats_documentation_are_read_and_written() -> None:
    """The documentation's examples of an integer, a text and a nested message have the documented bytes."""
    assert encode((1, 150)) == bytes.fromhex("089601")
    assert encode((2, "testing")) == bytes.fromhex("120774657374696e67")
    assert encode((3, encode((1, 150)))) == bytes.fromhex("1a03089601")
    assert Message(bytes.fromhex("1a03089601")).single(3, b"") == bytes.fromhex("089601")


@given(st.lists(st.tuples(NUMBERS, INTEGERS | st.binary(max_size=40)), max_size=20))
def test_any_fields_are_the_same_after_encoding_and_decoding(fields: list[tuple[int, int | bytes]]) -> None:
    """Any fields are written as another encoder writes them, and read back in the same order."""
    data = encode(*fields)
    assert data == b"".join(field(number, value) for number, value in fields)
    message = Message(data)
    assert [(number, value) for number, _, value in message.fields] == fields
    assert message.encode() == data


@given(st.lists(st.tuples(NUMBERS, INTEGERS | st.binary(max_size=40)), min_size=1, max_size=4), st.integers(1, 20))
def test_a_message_that_is_cut_within_a_field_is_refused(fields: list[tuple[int, int | bytes]], cut: int) -> None:
    """A message whose last field is cut off is refused."""
    data, last = encode(*fields), encode(fields[-1])
    with pytest.raises(ValueError, match="cut off"):
        Message(data[: -min(cut, len(last) - 1)])


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(varint(0) + b"\x01", id="number-0"),
        pytest.param(varint(1 << 32) + b"\x01", id="large-number"),
        pytest.param(b"\x0b\x0c", id="group"),
        pytest.param(b"\x0e\x01", id="wire-type-6"),
        pytest.param(b"\x08" + b"\xff" * 9 + b"\x02", id="integer-of-65-bits"),
        pytest.param(b"\x08" + b"\x80" * 10 + b"\x00", id="integer-of-11-bytes"),
        pytest.param(b"\x08\x00" * (FIELDS_MAX + 1), id="too-many-fields"),
    ],
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    """Bad field numbers, groups, integers of more than 64 bits and too many fields are refused."""
    with pytest.raises(ValueError, match=r"field number|wire type|64 bits"):
        Message(data)


def test_a_message_with_the_largest_number_of_fields_is_read() -> None:
    """The limit on fields is inclusive, and so is the largest integer."""
    assert len(Message(b"\x08\x00" * FIELDS_MAX).fields) == FIELDS_MAX
    assert Message(b"\x08" + b"\xff" * 9 + b"\x01")[1] == (1 << 64) - 1


def test_a_single_field_is_neither_repeated_nor_of_another_type() -> None:
    """A field that may occur once is refused if it is repeated or has another wire type, and has a default."""
    message = Message(field(1, 5) + field(2, b"a") + field(2, b"b") + b"\x1d1234" + field(4, b"x"))
    assert (message.single(1, 0), message.single(4, b""), message.single(9, b"none")) == (5, b"x", b"none")
    for number in (1, 2, 3):
        with pytest.raises(ValueError, match=f"field {number} is repeated or of another type"):
            message.single(number, b"")
    with pytest.raises(ValueError, match="field 4"):
        message.single(4, 0)
