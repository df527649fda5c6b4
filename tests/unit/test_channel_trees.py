"""The stream that carries file trees."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x07_sandbox.channel.trees import NAME_MAX, NO_TIME, Entry, Hole, Kind, Piece, Reader, segment
from x07_sandbox.errors import PeerError

PARTS = (
    st.binary(min_size=1, max_size=20)
    .filter(lambda part: b"/" not in part and b"\0" not in part)
    .filter(lambda part: part not in {b".", b".."})
)
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(b"/".join)
FILES = st.lists(st.one_of(st.binary(min_size=1, max_size=50), st.integers(1, 1 << 30)), max_size=4)
RECORDS = st.lists(
    st.one_of(
        st.tuples(st.just(Kind.FOLDER), NAMES, st.integers(0, 0o7777)),
        st.tuples(st.just(Kind.FILE), NAMES, FILES),
        st.tuples(st.just(Kind.LINK), NAMES, st.binary(min_size=1, max_size=30).filter(lambda text: b"\0" not in text)),
        st.tuples(st.just(Kind.DELETED), NAMES, st.none()),
        st.tuples(st.just(Kind.UNSUPPORTED), NAMES, st.integers(0, 0xFFFF)),
        st.tuples(st.just(Kind.TOO_LARGE), NAMES, st.integers(0, 0o7777)),
        st.tuples(st.just(Kind.ROOT), st.integers(0, 127).map(lambda number: b"%d" % number), st.none()),
    ),
    max_size=12,
)


def encoded(kind: Kind, name: bytes, more: object) -> tuple[bytes, list[object]]:
    """A record's bytes, and the events that its reader must return."""
    if kind is Kind.FILE:
        assert isinstance(more, list)
        size = sum(part if isinstance(part, int) else len(part) for part in more)
        data = Entry(kind, name, mode=0o640, mtime_ns=-5, size=size).encoded()
        heard: list[object] = [(kind, name, 0o640, -5, size, b"")]
        for part in more:
            if isinstance(part, int):
                data += segment(part, hole=True)
                heard.append(part)
            else:
                data += segment(len(part)) + part
                heard.append(part)
        return data, [*heard, "end"]
    mode = more if isinstance(more, int) else 0
    target = more if isinstance(more, bytes) else b""
    mtime_ns = -len(name) if kind in {Kind.FOLDER, Kind.LINK} else NO_TIME
    entry = Entry(kind, name, mode=mode, mtime_ns=mtime_ns, target=target)
    return entry.encoded(), [(kind, name, mode, mtime_ns, 0, target)]


def events_of(reader: Reader, data: bytes) -> list[object]:
    """The reader's events, with the pieces of a segment as they arrive."""
    heard: list[object] = []
    for event in reader.feed(data):
        if isinstance(event, Entry):
            heard.append((event.kind, event.name, event.mode, event.mtime_ns, event.size, event.target))
        elif isinstance(event, Piece):
            heard.append(event.data)
        else:
            heard.append(event.size if isinstance(event, Hole) else "end")
    return heard


def joined(heard: list[object]) -> list[object]:
    """The same events with adjacent pieces joined."""
    found: list[object] = []
    for event in heard:
        if isinstance(event, bytes) and found and isinstance(found[-1], bytes):
            found[-1] += event
        else:
            found.append(event)
    return found


@given(RECORDS, st.lists(st.integers(1, 40), min_size=1))
def test_a_stream_is_read_as_it_was_written_however_it_is_cut(
    records: list[tuple[Kind, bytes, object]], cuts: list[int]
) -> None:
    """A tree survives encoding and decoding, however its stream is cut."""
    data, expected = b"", []
    for record in records:
        part, heard = encoded(*record)
        data += part
        expected += heard
    data += Entry(Kind.END, b"").encoded()
    expected.append((Kind.END, b"", 0, NO_TIME, 0, b""))
    reader, at, number = Reader(), 0, 0
    found: list[object] = []
    while at < len(data):
        size = cuts[number % len(cuts)]
        found += events_of(reader, data[at : at + size])
        at, number = at + size, number + 1
    assert joined(found) == joined(expected)
    assert reader.ended


@pytest.mark.parametrize(
    "name", [b"/etc/passwd", b"..", b"a/../b", b"a//b", b"a/", b".", b"./a", b"a\0b", b"a" * 256, b"a/" * 2048 + b"a"]
)
def test_a_name_that_leaves_its_tree_is_refused(name: bytes) -> None:
    """A name that is absolute, goes up, has an empty part or is too long is rejected."""
    with pytest.raises(PeerError, match="bad file tree"):
        list(Reader().feed(Entry(Kind.FOLDER, name).encoded()))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x09\0\0", "unknown record 9"),
        (b"\x01\xff\xff", "a name is too long"),
        (Entry(Kind.FILE, b"a", size=1 << 41).encoded(), "a file is too large"),
        (Entry(Kind.FILE, b"a", size=5).encoded() + segment(6), "a segment exceeds its file"),
        (Entry(Kind.FILE, b"a", size=5).encoded() + segment(0), "a segment exceeds its file"),
        (Entry(Kind.FILE, b"a", size=5).encoded() + segment(6, hole=True), "a segment exceeds its file"),
        (Entry(Kind.LINK, b"a").encoded(), "a link target is empty or too long"),
        (Entry(Kind.LINK, b"a", target=b"x\0").encoded(), "NUL byte"),
        (Entry(Kind.ROOT, b"-1").encoded(), "ROOT without a number"),
        (Entry(Kind.ROOT, b"1234").encoded(), "ROOT without a number"),
        (Entry(Kind.END, b"a").encoded(), "END with a name"),
        (Entry(Kind.END, b"").encoded() + b"\x01", "data after the end"),
    ],
)
def test_a_broken_stream_is_refused_with_its_reason(data: bytes, why: str) -> None:
    """Each rule of the tree format has its own error."""
    with pytest.raises(PeerError, match=why):
        list(Reader().feed(data))


def test_the_longest_name_is_taken() -> None:
    """A path of the maximal length of Linux is accepted."""
    name = b"/".join([b"a" * 255] * 16)[:NAME_MAX]
    (entry,) = list(Reader().feed(Entry(Kind.FOLDER, name, mode=0o755).encoded()))
    assert isinstance(entry, Entry)
    assert entry.name == name


@pytest.mark.parametrize("kind", [Kind.FOLDER, Kind.FILE, Kind.LINK])
@pytest.mark.parametrize(("mtime_ns", "carried"), [(1 << 70, (1 << 63) - 1), (-(1 << 70), 1 - (1 << 63)), (-7, -7)])
def test_an_mtime_beyond_the_format_is_carried_as_the_nearest(kind: Kind, mtime_ns: int, carried: int) -> None:
    """An mtime outside the format's range is clamped."""
    data = Entry(kind, b"a", mtime_ns=mtime_ns, target=b"x").encoded()
    (entry, *_) = list(Reader().feed(data))
    assert isinstance(entry, Entry)
    assert entry.mtime_ns == carried
