"""Streams: any bytes, however they are cut, yield events or PeerError, and every byte sent arrives in order."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.guest.messages import GUEST, HOST, OTHER, credit, frame, taken
from tests.guest.tables import (
    ASKED,
    BOTH,
    DOWN,
    ORDER,
    PACKETS,
    REPORT,
    ROLES,
    SMALL,
    TABLES,
    UP,
    held,
    most_of,
)
from x07_sandbox.channel import link
from x07_sandbox.channel.streams import (
    ANSWER,
    CREDIT,
    DATA,
    DATAGRAM,
    FIN,
    HEADER,
    MESSAGE,
    OPEN,
    RESET,
    Event,
    Role,
    Streams,
    Table,
)
from x07_sandbox.errors import ChannelUsageError, PeerError

TABLE: Final = st.sampled_from(list(TABLES.values()))
TYPES: Final = (MESSAGE, OPEN, ANSWER, DATA, CREDIT, FIN, RESET, DATAGRAM)


def opening(number: int, kind: int, payload: bytes = b"x") -> bytes:
    """A frame that opens a stream."""
    return frame(OPEN, number, payload, kind)


def passed(sender: Streams, receiver: Streams) -> list[Event]:
    """Deliver all pending bytes of one end to the other; return the events."""
    return list(receiver.receive(taken(sender)))


def ends(table: Table = SMALL) -> tuple[Streams, Streams]:
    """Both ends: host and guest."""
    return Streams(HOST, table), Streams(GUEST, table)


def opened(*kinds: int) -> tuple[Streams, Streams, list[int]]:
    """Both ends with streams of these kinds, open and answered, and the numbers of the streams."""
    host, guest = ends()
    numbers = []
    for kind in kinds:
        by = host if SMALL.streams[kind].opener is HOST else guest
        numbers.append(by.open(kind, b"x"))
        passed(by, guest if by is host else host)
        if SMALL.streams[kind].answered:
            host.answer(numbers[-1])
            passed(host, guest)
    return host, guest, numbers


# from the opening to the end; see also test_channel_exchange.py


def test_numbers_do_not_collide() -> None:
    """The host opens even numbers and the guest odd ones, each higher than the one before."""
    host, guest = ends()
    assert [host.open(DOWN), host.open(BOTH), host.open(DOWN)] == [2, 4, 6]
    assert [guest.open(UP), guest.open(ASKED, b"x")] == [1, 3]


# bounds of what may be open


@given(TABLE, ROLES, st.data())
def test_a_hostile_peer_costs_bounded_memory(table: Table, role: Role, data: st.DataObject) -> None:
    """Whatever a peer opens, resets and ends, in any order, one end remembers and queues a bounded amount."""
    end, peer = Streams(role, table), OTHER[role]
    first = 2 if peer is HOST else 1
    kinds = [number for number, kind in table.streams.items() if kind.opener is peer] or list(table.streams)
    numbers = st.integers(0, 12).map(lambda at: first + 2 * at)
    parts = st.one_of(
        st.tuples(numbers, st.sampled_from(kinds)).map(
            lambda pair: opening(pair[0], pair[1], bytes(table.streams[pair[1]].least))
        ),
        st.tuples(st.sampled_from([FIN, RESET, ANSWER, DATAGRAM]), numbers).map(lambda pair: frame(*pair)),
        st.tuples(numbers, st.integers(1, table.data_max)).map(lambda pair: frame(DATA, pair[0], bytes(pair[1]))),
        st.tuples(numbers, st.integers(0, table.window)).map(lambda pair: credit(*pair)),
        st.binary(max_size=20),
    )
    queued = 0
    for part in data.draw(st.lists(parts, max_size=30)):
        with contextlib.suppress(PeerError):
            for event in end.receive(part):
                if event.type == OPEN:
                    queued += HEADER.size
                    if table.streams[event.code].answered:
                        end.answer(event.stream)
                elif event.type == DATA:
                    queued += HEADER.size + 4
                    end.consumed(event.stream, len(event.data))
        assert held(end) <= most_of(table, peer)
        open_now = Counter(stream.code for stream in end._open.values())  # noqa: SLF001 - the bound is the promise
        assert all(count <= table.streams[code].at_once for code, count in open_now.items())
        assert len(end._counts) <= len(table.streams)  # noqa: SLF001
        assert end.pending() <= queued


def test_a_flood_of_short_streams_costs_nothing() -> None:
    """A peer that opens and ends thousands of streams leaves nothing behind."""
    host = Streams(HOST, SMALL)
    for number in range(1, 20_001, 2):
        ending = FIN if number % 4 == 1 else RESET
        list(host.receive(opening(number, UP) + frame(DATA, number, b"x") + frame(ending, number)))
    assert not host._open  # noqa: SLF001 - the bound on it is the promise
    assert not held(host)
    assert not host.pending()


# any bytes


def allowed(table: Table, sender: Role, fields: tuple[int, int, int, int, int]) -> bool:
    """Return whether a role may send a frame with this header."""
    kind, code, zero, stream, length = fields
    if zero or (stream == 0) != (kind == MESSAGE):
        return False
    if kind == MESSAGE:
        message = table.messages.get(code)
        return message is not None and message.sender is sender and message.least <= length <= message.most
    if kind == OPEN:
        opened = table.streams.get(code)
        return opened is not None and opened.opener is sender and opened.least <= length <= opened.most
    sizes = {
        ANSWER: range(1),
        DATA: range(1, table.data_max + 1),
        CREDIT: range(4, 5),
        FIN: range(1),
        RESET: range(1),
        DATAGRAM: range(table.datagram_max + 1),
    }.get(kind, range(0))
    return length in sizes and code <= (table.code_max if kind in {ANSWER, RESET} else 0)


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("name", TABLES)
def test_a_bad_header_is_refused_before_its_payload_comes(name: str, role: Role) -> None:
    """An invalid header is rejected before any of its payload is buffered, and a valid one is held until it comes."""
    table = TABLES[name]
    headers = set()
    for kind, code in itertools.product([*TYPES, 0, 9, 255], [*range(table.code_max + 18), 255]):
        form = table.messages.get(code) if kind == MESSAGE else table.streams.get(code)
        sizes = {0, 4, table.data_max, table.datagram_max, *((form.least, form.most) if form else ())}
        lengths = {2**32 - 1, *(size + more for size in sizes for more in (-1, 0, 1) if size + more >= 0)}
        headers |= {(kind, code, 0, number, length) for number in (0, 1, 2**32 - 1) for length in lengths}
        headers |= {(kind, code, zero, number, 4) for zero in (1, 256) for number in (0, 1)}
    for fields in headers:
        end = Streams(role, table)
        if not allowed(table, OTHER[role], fields):
            with contextlib.suppress(PeerError):
                list(end.receive(HEADER.pack(*fields)))
                raise AssertionError(f"{fields} was accepted")
            assert held(end) == 0, fields
        elif fields[-1]:
            assert list(end.receive(HEADER.pack(*fields))) == [], fields
            assert held(end) == HEADER.size, fields


# faults of the peer

# Headers that are always wrong have a test of their own.
# What a guest sends to a host with the streams 1 (ASKED) and 3 (PACKETS), both answered, 5 (UP), 2 (BOTH), 4 (DOWN).
FULL: Final = frame(DATA, 1, bytes(16)) * 4
TO_HOST: Final = {
    "unknown type": frame(9, 1),
    "ANSWER to a guest's stream": frame(ANSWER, 1),
    "ANSWER to a stream without": frame(ANSWER, 2),
    "ANSWER to its own request": opening(7, ASKED) + frame(ANSWER, 7),
    "OPEN of an even number": opening(8, UP),
    "OPEN of a stream that is open": opening(1, UP),
    "OPEN of a stream that was closed": frame(RESET, 5) + opening(5, UP),
    "descending OPEN": opening(11, UP) + opening(9, ASKED),
    "OPEN twice": opening(7, UP) + opening(7, UP),
    "too many of a kind": opening(7, UP) + opening(9, UP),
    "past credit": FULL + frame(DATA, 1, b"x"),
    "no credit": credit(1, 0),
    "more credit than the window": credit(1, 1),
    "highest credit": credit(1, 2**32 - 1),
    "credit for its own one-way stream": credit(5, 1),
    "credit for datagrams": credit(3, 1),
    "never opened": frame(DATA, 7, b"x"),
    "never opened by the host": frame(DATA, 6, b"x"),
    "credit of a stream never opened": credit(7, 1),
    "RESET of a stream never opened": frame(RESET, 7),
    "DATA before ANSWER": opening(7, ASKED) + frame(DATA, 7, b"x"),
    "CREDIT before ANSWER": opening(7, ASKED) + credit(7, 1),
    "FIN before ANSWER": opening(7, ASKED) + frame(FIN, 7),
    "DATAGRAM before ANSWER": opening(7, PACKETS) + frame(DATAGRAM, 7, b"x"),
    "DATA after FIN": frame(FIN, 1) + frame(DATA, 1, b"x"),
    "FIN twice": frame(FIN, 1) * 2,
    "DATAGRAM after FIN": frame(FIN, 3) + frame(DATAGRAM, 3),
    "DATA from the receiver": frame(DATA, 4, b"x"),
    "FIN from the receiver": frame(FIN, 4),
    "DATAGRAM on bytes": frame(DATAGRAM, 1, b"x"),
    "DATA on datagrams": frame(DATA, 3, b"x"),
}
# What a host sends to a guest that has asked for stream 1 (ASKED).
TO_GUEST: Final = {
    "OPEN of an odd number": opening(3, DOWN),
    "too many of a kind": opening(2, DOWN) + opening(4, DOWN) + opening(6, DOWN),
    "DATA before ANSWER": frame(DATA, 1, b"x"),
    "CREDIT before ANSWER": credit(1, 1),
    "FIN before ANSWER": frame(FIN, 1),
    "ANSWER twice": frame(ANSWER, 1) * 2,
    "a refusal after ANSWER": frame(ANSWER, 1) + frame(ANSWER, 1, code=5),
    "ANSWER to a stream never asked for": frame(ANSWER, 3),
    "ANSWER to its own stream": opening(2, DOWN) + frame(ANSWER, 2),
    "past credit": frame(ANSWER, 1) + FULL + frame(DATA, 1, b"x"),
    "more credit than the window": frame(ANSWER, 1) + credit(1, 1),
    "DATAGRAM on bytes": frame(ANSWER, 1) + frame(DATAGRAM, 1, b"x"),
}


@pytest.mark.parametrize("name", TO_HOST)
def test_a_violation_of_the_guest_is_an_error(name: str) -> None:
    """An invalid frame from the guest ends the streams for good."""
    host, _, numbers = opened(ASKED, PACKETS, UP, BOTH, DOWN)
    assert numbers == [1, 3, 5, 2, 4]
    check_failed(host, TO_HOST[name], opening(101, UP))


@pytest.mark.parametrize("name", TO_GUEST)
def test_a_violation_of_the_host_is_an_error(name: str) -> None:
    """An invalid frame from the host ends the streams for good."""
    guest = Streams(GUEST, SMALL)
    guest.open(ASKED, b"x")
    check_failed(guest, TO_GUEST[name], frame(RESET, 1))


def check_failed(end: Streams, data: bytes, good: bytes) -> None:
    """Check that the end of *data* is rejected, and that the streams stay failed and buffer nothing."""
    with pytest.raises(PeerError):
        list(end.receive(data + good))
    for later in (b"", good, bytes(1 << 20), good):
        with pytest.raises(PeerError):
            list(end.receive(later))
    assert held(end) == 0


def test_leftover_events_are_returned_once() -> None:
    """Events left over from an unfinished iteration are returned by the next one, and none of them twice."""
    host, _, [number] = opened(UP)
    unfinished = host.receive(b"".join(frame(DATA, number, b"%d" % at) for at in range(3)))
    assert next(unfinished).data == b"0"
    assert [event.data for event in host.receive(b"")] == [b"1", b"2"]
    assert list(unfinished) == []


# faults of this side


def test_own_misuse_sends_nothing() -> None:
    """Each wrong use of the streams raises ChannelUsageError, sends nothing and changes nothing."""
    host, guest, [asked, packets, up, both, down] = opened(ASKED, PACKETS, UP, BOTH, DOWN)
    waiting = guest.open(ASKED, b"x")
    passed(guest, host)
    wrong: list[tuple[Streams, str, tuple[Any, ...]]] = [
        (host, "message", (REPORT, b"xx")),
        (guest, "message", (ORDER, b"")),
        (guest, "message", (REPORT, b"x")),
        (host, "message", (ORDER, bytes(10))),
        (host, "open", (UP,)),
        (guest, "open", (DOWN,)),
        (guest, "open", (ASKED, b"")),
        (guest, "open", (ASKED, b"12345")),
        (host, "answer", (both,)),
        (host, "answer", (asked,)),
        (host, "answer", (up,)),
        (guest, "answer", (waiting,)),
        (guest, "answer", (down,)),
        (guest, "finish", (waiting,)),
        (host, "finish", (waiting,)),
        *[(end, "consumed", (number, 1)) for end in (host, guest) for number in (asked, packets, both)],
        (guest, "consumed", (down, 1)),
        (host, "consumed", (up, 1)),
        (host, "consumed", (up, -1)),
    ]
    for end, name, arguments in wrong:
        with pytest.raises(ChannelUsageError):
            getattr(end, name)(*arguments)
        assert host.pending() == guest.pending() == 0, name
    for end in (host, guest):  # not errors, but nothing happens
        assert end.send(packets, b"x") == 0
        end.send_datagram(asked, b"x")
        end.consumed(asked, 0)
    assert host.pending() == guest.pending() == 0
    guest.send(up, bytes(16))
    passed(guest, host)
    for count in (17, -1):
        with pytest.raises(ChannelUsageError, match="never received"):
            host.consumed(up, count)
    host.consumed(up, 16)
    assert passed(host, guest) == [Event(CREDIT, up, UP)]


# the order of what is sent


def test_small_frames_overtake_data() -> None:
    """Answers, credit and resets overtake queued data; a stream's end does not."""
    host, guest, [first, second, third] = opened(ASKED, UP, ASKED)
    waiting = guest.open(ASKED, b"x")
    guest.send(second, bytes(32))
    passed(guest, host)
    host.send(first, bytes(48))
    host.finish(first)
    host.answer(waiting)
    host.consumed(second, 32)
    host.reset(third)
    small = [(ANSWER, waiting), (CREDIT, second), (RESET, third)]
    kinds = [(event.type, event.stream) for event in passed(host, guest)]
    assert kinds == [*small, *[(DATA, first)] * 3, (FIN, first)]


def test_small_frames_are_written_together() -> None:
    """Small frames are joined for one write of at most 64 KiB, and a larger frame is written alone."""
    host = Streams(HOST, link.STREAMS)
    numbers = [host.open(link.Stream.INPUT, at.to_bytes(4, "big")) for at in range(5)]
    for number in numbers:
        host.finish(number)
    queued = host.pending()
    assert len(host.data_to_send()) == queued == 5 * (2 * HEADER.size + 4)
    host.sent(queued)
    number = host.open(link.Stream.INPUT, bytes(4))
    host.send(number, bytes(link.WINDOW))
    sizes = []
    while data := host.data_to_send():
        sizes.append(len(data))
        host.sent(len(data))
    assert max(sizes) == HEADER.size + link.DATA_MAX
    assert len(sizes) == 1 + link.WINDOW // link.DATA_MAX  # with the frame that opens the stream


# windows


def test_credit_comes_in_steps_of_a_quarter_window() -> None:
    """Credit is sent in steps of a quarter of the window, and none is lost."""
    host, guest, [number] = opened(ASKED)
    quarter = SMALL.window // 4
    assert guest.send(number, bytes(SMALL.window)) == SMALL.window
    passed(guest, host)
    for _ in range(quarter - 1):
        host.consumed(number, 1)
    assert host.pending() == 0
    host.consumed(number, 1)
    assert passed(host, guest) == [Event(CREDIT, number, ASKED)]
    assert guest.window(number) == quarter
