"""Promises about what the virtual machine monitor says besides the channel: bounded, harmless, kept for diagnosis."""

from __future__ import annotations

import os
import unicodedata
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from x07_sandbox.host.bounded_stream import BoundedStream

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe that does not block; the test may close its second end."""
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    yield read_end, write_end
    os.close(read_end)
    try:
        os.fstat(write_end)
    except OSError:
        return
    os.close(write_end)


def test_only_the_last_bytes_of_a_flood_are_kept(pipe: tuple[int, int]) -> None:
    """A flood is read on and counted, and costs no more memory than its bound."""
    stream = BoundedStream(pipe[0], keep_bytes=100)
    for turn in range(50):
        os.write(pipe[1], b"%02d" % turn * 1000)
        stream.read()
        assert len(stream.text()) <= 100
    assert stream.total_bytes == 100_000
    assert stream.text() == "49" * 50


def test_one_turn_takes_one_chunk(pipe: tuple[int, int]) -> None:
    """A stream that always has more to say does not hold up the loop that reads it."""
    written = os.write(pipe[1], bytes(1 << 20))
    stream = BoundedStream(pipe[0], keep_bytes=10)
    stream.read()
    assert 0 < stream.total_bytes <= written
    assert stream.total_bytes <= 64 * 1024


def test_nothing_there_is_not_the_end(pipe: tuple[int, int]) -> None:
    """A read with nothing there returns at once; only a closed writer ends the stream."""
    stream = BoundedStream(pipe[0], keep_bytes=10)
    stream.read()
    assert not stream.ended
    os.write(pipe[1], b"bye")
    os.close(pipe[1])
    stream.read()
    assert (stream.text(), stream.ended) == ("bye", False)
    stream.read()
    stream.read()
    assert (stream.text(), stream.ended) == ("bye", True)


@given(st.binary(max_size=300))
@example(b"\x1b]0;title\x07\x1b[31m\x9b2J\r\x08\x7f")
@example("\u202e\u200b\u2028\U000e0041".encode())
def test_text_cannot_speak_to_a_terminal(data: bytes) -> None:
    """Whatever a guest writes, its text has no control, escape, direction or line separator but tab and newline."""
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    try:
        os.write(write_end, data)
        stream = BoundedStream(read_end, keep_bytes=200)
        stream.read()
    finally:
        os.close(write_end)
        os.close(read_end)
    text = stream.text()
    text.encode("utf-8")
    assert all(char in "\n\t" or not unicodedata.category(char).startswith(("C", "Zl", "Zp")) for char in text)


@given(st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), max_size=50))
def test_readable_text_stays_as_it_is(text: str) -> None:
    """Letters, digits and marks of any script come through."""
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    try:
        os.write(write_end, text.encode())
        stream = BoundedStream(read_end, keep_bytes=1000)
        stream.read()
    finally:
        os.close(write_end)
        os.close(read_end)
    assert stream.text() == text
