"""Output sinks: caps, slow readers and terminal filtering."""

from __future__ import annotations

import os
import pty
import select
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x07_sandbox.cli.console import LiveLine, Progress
from x07_sandbox.sessions.transfers import Sink, TerminalFilter, read_all

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def keep_fd() -> Iterator[int]:
    """A file in which a sink saves its stream."""
    with tempfile.TemporaryFile() as file:
        yield file.fileno()


def settled(sink: Sink) -> int:
    """The number of bytes delivered once nothing is pending."""
    done = 0
    while (fd := sink.progress_fd) is not None:
        assert select.select([fd], [], [], 60)[0]
        done += sink.pump()
    return done


@given(st.lists(st.binary(max_size=64), max_size=20))
def test_a_terminal_never_gets_a_control_sequence(chunks: list[bytes]) -> None:
    """A terminal gets no control characters but newline, tab and carriage return."""
    shown = TerminalFilter()
    text = b"".join(shown(chunk) for chunk in chunks).decode()
    controls = {chr(code) for code in [*range(32), *range(0x7F, 0xA0)]} - {"\n", "\t", "\r"}
    assert not controls & set(text)


@given(st.text(alphabet=st.characters(exclude_categories=["C"]), max_size=50), st.integers(1, 7))
def test_ordinary_text_passes_the_filter_however_it_is_cut(text: str, cut: int) -> None:
    """Ordinary text reaches a terminal unchanged, however it is cut."""
    shown, data = TerminalFilter(), text.encode()
    assert b"".join(shown(data[at : at + cut]) for at in range(0, len(data), cut)) == data


def test_the_progress_line_has_no_control_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The progress line contains no control sequences of hostile names."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        LiveLine()("copying /a\x1b[2J\nb\x9b in")
        Progress("im\x1bage")("x\x1b[1A")
        shown = b""
        while not shown.endswith(b"[1A"):
            shown += os.read(ours, 1000)
    os.close(ours)
    assert "copying /a\\x1b[2J\\nb\\x9b in" in shown.decode()
    assert "im\\x1bage: [" in shown.decode()
    assert shown.count(b"\x1b") == shown.count(b"\r\x1b[K") == 2


def test_a_sink_keeps_exactly_its_cap(keep_fd: int) -> None:
    """A sink saves exactly its cap and marks the overflow."""
    sink = Sink("stdout", keep_fd=keep_fd, live_fd=None, max_bytes=10)
    seen = [(sink.take(data), sink.overflow) for data in (b"12345678", b"abcdefgh")]
    assert seen == [(8, False), (8, True)]
    assert os.pread(keep_fd, 100, 0) == b"12345678ab"


def test_a_sink_to_a_terminal_filters_and_settles_every_byte(keep_fd: int) -> None:
    """A terminal gets filtered text, and the file gets the raw bytes."""
    main, terminal = pty.openpty()
    try:
        sink = Sink("stdout", keep_fd=keep_fd, live_fd=terminal, max_bytes=1000)
        raw = b"\x1b]0;owned\x07plain\n"
        done = sink.take(raw)
        done += settled(sink)
        assert done == len(raw)
        assert b"\x1b" not in os.read(main, 1000)
        assert os.pread(keep_fd, 100, 0) == raw
        sink.close()
    finally:
        os.close(main)
        os.close(terminal)


def test_a_stream_survives_its_reader(keep_fd: int) -> None:
    """A stream continues after its live reader has gone."""
    read, write = os.pipe()
    try:
        sink = Sink("stdout", keep_fd=keep_fd, live_fd=write, max_bytes=1000)
        sink.take(b"first")
        os.close(read)
        assert settled(sink) == 5
        sink.take(b"second")
        settled(sink)
        assert sink.reader_gone
        assert sink.take(b"third") == 5
        assert os.pread(keep_fd, 100, 0) == b"firstsecondthird"
        sink.close()
    finally:
        os.close(write)


@pytest.mark.parametrize("chunk", [4095, 4096, 65536])
def test_full_pipes_never_block(keep_fd: int, chunk: int) -> None:
    """Streams into a full pipe never block."""
    read, write = os.pipe()
    with tempfile.TemporaryFile() as other:
        sinks = [
            Sink(name, keep_fd=fd, live_fd=write, max_bytes=1 << 20)
            for name, fd in (("stdout", keep_fd), ("stderr", other.fileno()))
        ]
        for _ in range(3):
            for sink in sinks:
                sink.take(b"x" * chunk)
                sink.pump()
        waiting = [sink for sink in sinks if sink.progress_fd is not None]
        assert waiting or chunk < 65536
        left = 6 * chunk
        while left:
            left -= len(os.read(read, 65536))
        for sink in sinks:
            settled(sink)
            sink.close()
    os.close(read)
    os.close(write)


def test_non_blocking_input_is_read_to_its_end() -> None:
    """Input on a non-blocking descriptor is read to its end, within the limit."""
    theirs, ours = os.pipe()
    os.set_blocking(theirs, False)
    with ThreadPoolExecutor(1) as threads:
        read = threads.submit(read_all, theirs, 100)
        for piece in (b"one ", b"two"):
            assert wait([read], timeout=0.2).not_done
            os.write(ours, piece)
        os.close(ours)
        assert read.result(60) == b"one two"
    os.close(theirs)
    with Path("/dev/zero").open("rb") as endless:
        assert len(read_all(endless.fileno(), 100)) > 100
