"""Tables of streams to test with, and two ends of any of them, joined by two pipes that hypothesis drives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.guest.messages import GUEST, HOST, OTHER
from x07_sandbox.channel import egress, link
from x07_sandbox.channel.messages import Message
from x07_sandbox.channel.streams import DATA, FIN, HEADER, RESET, Event, Kind, Role, Streams, Table
from x07_sandbox.channel.streams import Message as Form
from x07_sandbox.errors import ChannelUsageError

ORDER, REPORT = 1, 2  # messages of the small table
DOWN, UP, BOTH, ASKED, PACKETS = 1, 2, 3, 4, 5  # kinds of streams in the small table
# A table with every feature, and windows that a test fills quickly.
SMALL: Final = Table(
    {ORDER: Form(HOST, 0, 9), REPORT: Form(GUEST, 2, 3)},
    {
        DOWN: Kind(HOST, HOST, 0, 4, 2),
        UP: Kind(GUEST, GUEST, 0, 4, 2),
        BOTH: Kind(HOST, None, 0, 4, 2),
        ASKED: Kind(GUEST, None, 1, 4, 3, answered=True),
        PACKETS: Kind(GUEST, None, 0, 4, 2, answered=True, datagrams=True),
    },
    data_max=16,
    window=64,
    datagram_max=8,
    code_max=7,
)
TABLES: Final = {"channel": link.STREAMS, "egress": egress.STREAMS, "small": SMALL}
ROLES: Final = st.sampled_from(Role)
SIZES: Final = st.sampled_from([1, 13, 70, 5000, 1 << 20])


def held(end: Streams) -> int:
    """Return the number of bytes that one end holds of its peer's."""
    return len(end._in)  # noqa: SLF001 - the bound on it is the promise


def most_of(table: Table, sender: Role) -> int:
    """Return the size of the largest frame that a role may send."""
    messages = [message.most for message in table.messages.values() if message.sender is sender]
    kinds = [kind.most for kind in table.streams.values() if kind.opener is sender]
    return HEADER.size + max(*messages, *kinds, table.data_max, table.datagram_max)


class Joined(RuleBasedStateMachine):
    """Two ends joined by two pipes: every byte arrives in order, under any interleaving, cut and stall."""

    table: Table
    ends: dict[Role, Streams]

    def join(self, table: Table, ends: dict[Role, Streams]) -> None:
        """Join the ends by empty pipes."""
        self.table, self.ends = table, ends
        self.pipes = {role: bytearray() for role in Role}  # by writer
        self.filler = 0
        self.forget()

    def forget(self) -> None:
        """Forget all streams."""
        self.kinds: dict[int, int] = {}
        self.sent: dict[tuple[Role, int], bytearray] = {}
        self.came: dict[tuple[Role, int], bytearray] = {}  # by sender
        self.used: dict[tuple[Role, int], int] = {}
        self.finished: set[tuple[Role, int]] = set()
        self.whole: set[tuple[Role, int]] = set()  # that have ended at their receiver
        self.dropped: set[int] = set()  # streams that were reset or refused, or that ended with their command

    def note(self, number: int, code: int) -> None:
        """Note a stream that was opened."""
        assert number not in self.kinds
        self.kinds[number] = code
        sender = self.table.streams[code].sender
        for role in Role if sender is None else (sender,):
            self.sent[role, number], self.came[role, number], self.used[role, number] = bytearray(), bytearray(), 0

    def some(self, data: st.DataObject) -> int | None:
        """Return a stream that was opened, mostly one that is still open, or None."""
        numbers = list(self.kinds)
        still = [number for number in numbers if any(end.is_open(number) for end in self.ends.values())]
        return data.draw(st.sampled_from(still or numbers) | st.sampled_from(numbers)) if numbers else None

    @rule(data=st.data(), role=ROLES, share=st.sampled_from([0.001, 0.3, 1, 3]))
    def give(self, data: st.DataObject, role: Role, share: float) -> None:
        """Offer data, more than the window at times."""
        number = self.some(data)
        if number is not None:
            self.give_one(role, number, 1 + int(share * self.table.window))

    def give_one(self, role: Role, number: int, size: int) -> None:
        """Offer so much data of a role on a stream."""
        end = self.ends[role]
        self.filler += 1
        content = bytes([self.filler % 256, self.filler * 7 % 256, 0]) * (size // 3 + 1)
        window = end.window(number)
        count = end.send(number, memoryview(content)[:size])
        assert count == min(size, window)
        if count:
            assert end._open[number].opened  # noqa: SLF001 - no method of users tells whether it was answered
            self.sent[role, number] += content[:count]

    @rule(data=st.data(), role=ROLES)
    def finish(self, data: st.DataObject, role: Role) -> None:
        """End one side's data."""
        number = self.some(data)
        if number is not None:
            self.finish_one(role, number)

    def finish_one(self, role: Role, number: int) -> None:
        """End one side's data on a stream."""
        end = self.ends[role]
        sends = end.is_open(number) and (role, number) in self.sent
        if sends and not end._open[number].opened:  # noqa: SLF001 - no method of users tells whether it was answered
            with pytest.raises(ChannelUsageError):
                end.finish(number)
            return
        end.finish(number)
        if sends:
            self.finished.add((role, number))

    @rule(data=st.data(), role=ROLES, code=st.sampled_from([0, 5]))
    def reset(self, data: st.DataObject, role: Role, code: int) -> None:
        """Abort a stream, also one whose opening is still queued."""
        number = self.some(data)
        if number is not None and self.ends[role].is_open(number):
            self.reset_one(role, number, code if self.table.code_max else 0)

    def reset_one(self, role: Role, number: int, code: int) -> None:
        """Abort a stream."""
        self.ends[role].reset(number, code)
        self.dropped.add(number)

    @rule(data=st.data(), role=ROLES, share=st.sampled_from([0.001, 0.3, 1]))
    def use(self, data: st.DataObject, role: Role, share: float) -> None:
        """The reader of a role's data consumes some of it."""
        number = self.some(data)
        if number is not None and (role, number) in self.came:
            self.use_one(role, number, 1 + int(share * self.table.window))

    def use_one(self, role: Role, number: int, most: int) -> None:
        """The reader of a role's data consumes at most so much of a stream."""
        count = min(len(self.came[role, number]) - self.used[role, number], most)
        self.used[role, number] += count
        self.ends[OTHER[role]].consumed(number, count)

    @rule(most=SIZES)
    def carry(self, most: int) -> None:
        """Both ends write and read."""
        for role in Role:
            self.write(role, most)
            self.read(role, most)

    @rule(role=ROLES, most=SIZES)
    def write(self, role: Role, most: int) -> None:
        """The pipe takes some bytes."""
        data = self.ends[role].data_to_send()[:most]
        self.pipes[role] += data
        self.ends[role].sent(len(data))

    @rule(role=ROLES, most=SIZES)
    def read(self, role: Role, most: int) -> None:
        """The other end reads some bytes."""
        data = bytes(self.pipes[role][:most])
        del self.pipes[role][:most]
        for event in self.events(OTHER[role], data):
            self.take(role, event)

    def events(self, role: Role, data: bytes) -> Iterator[Message | Event]:
        """Return what the bytes mean at an end."""
        return self.ends[role].receive(data)

    def take(self, role: Role, event: Message | Event) -> None:
        """Check an event from a role."""
        assert isinstance(event, Event)
        if event.type == DATA:
            self.came[role, event.stream] += event.data
        elif event.type == FIN:
            assert (role, event.stream) in self.finished
            self.whole.add((role, event.stream))
        elif event.type == RESET:
            assert event.stream in self.dropped

    def settle(self) -> None:
        """Carry until nothing moves."""
        while any(end.pending() for end in self.ends.values()) or any(self.pipes.values()):
            self.carry(1 << 20)

    @invariant()
    def in_order(self) -> None:
        """Received bytes are a prefix of the bytes sent, nothing follows an end, and windows and memory hold."""
        for (role, number), came in self.came.items():
            sent = self.sent[role, number]
            assert sent.startswith(came)
            assert (role, number) not in self.whole or came == sent
            assert number in self.dropped or len(sent) - self.used[role, number] <= self.table.window
        for role, end in self.ends.items():
            assert held(end) <= most_of(self.table, OTHER[role])

    def check_whole(self) -> None:
        """Check that every byte of a stream that was not dropped has arrived."""
        self.in_order()
        for (role, number), came in self.came.items():
            if number not in self.dropped:
                assert came == self.sent[role, number]
                assert ((role, number) in self.whole) == ((role, number) in self.finished)
