"""Diagnostic output of the VMM: bounded, escaped and kept for error reports."""

from __future__ import annotations

import os
import unicodedata
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from x07_sandbox.backends.jailed import BoundedStream

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A non-blocking pipe; the test may close its write end."""
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    yield read_end, write_end
    os.close(read_end)
    try:
        os.fstat(write_end)
    except OSError:
        return
    os.close(write_end)


def test_only_the_last_bytes_of_a_flood_are_kept(pipe: tuple[int, int]) -> None:
    """A flood of diagnostics is drained and counted, and only its bounded tail is kept."""
    stream = BoundedStream(pipe[0], keep_bytes=100)
    for turn in range(50):
        os.write(pipe[1], b"%02d" % turn * 1000)
        stream.read()
        assert len(stream.text()) <= 100
    assert stream.total_bytes == 100_000
    assert stream.text() == "49" * 50


def test_one_read_takes_at_most_one_chunk(pipe: tuple[int, int]) -> None:
    """One read of a busy stream takes at most 64 KiB, so it cannot stall the loop."""
    written = os.write(pipe[1], bytes(1 << 20))
    stream = BoundedStream(pipe[0], keep_bytes=10)
    stream.read()
    assert 0 < stream.total_bytes <= written
    assert stream.total_bytes <= 64 * 1024


def test_an_empty_pipe_is_not_the_end(pipe: tuple[int, int]) -> None:
    """An empty pipe returns at once, and only a closed writer ends the stream."""
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


def shown(data: bytes) -> str:
    """The text of a stream with these bytes."""
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    os.write(write_end, data)
    os.close(write_end)
    stream = BoundedStream(read_end, keep_bytes=1000)
    stream.read()
    os.close(read_end)
    return stream.text()


@given(st.binary(max_size=300))
@example(b"\x1b]0;title\x07\x1b[31m\x9b2J\r\x08\x7f")
@example("\u202e\u200b\u2028\U000e0041".encode())
def test_guest_text_has_no_control_characters(data: bytes) -> None:
    """Guest text contains no control, escape, direction or separator characters except tab and newline."""
    text = shown(data)
    text.encode("utf-8")
    assert all(char in "\n\t" or not unicodedata.category(char).startswith(("C", "Zl", "Zp")) for char in text)


@given(st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), max_size=50))
def test_readable_text_stays_as_it_is(text: str) -> None:
    """Letters, digits and punctuation of any script pass unchanged."""
    assert shown(text.encode()) == text
