"""Exchanges: two ends with any table, and every byte that one sends arrives at the other in order."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.unit.test_channel_streams import GUEST, HOST, OTHER, ROLES, TABLES, held, most_of
from x07_sandbox.channel.streams import ANSWER, CREDIT, DATA, DATAGRAM, FIN, OPEN, RESET, Event, Role, Streams, Table
from x07_sandbox.errors import ChannelUsageError


class Exchange(RuleBasedStateMachine):
    """Two ends joined by two pipes: every byte arrives in order, under any interleaving, cut and stall."""

    table: Table

    @initialize(name=st.sampled_from(list(TABLES)))
    def begin(self, name: str) -> None:
        """Choose the table."""
        self.table = TABLES[name]
        self.ends = {role: Streams(role, self.table) for role in Role}
        self.pipes = {role: bytearray() for role in Role}  # by writer
        self.kinds: dict[int, int] = {}
        self.unanswered: list[int] = []
        self.numbers: list[int] = []
        self.sent: dict[tuple[Role, int], bytearray] = {}
        self.came: dict[tuple[Role, int], bytearray] = {}  # by sender
        self.used: dict[tuple[Role, int], int] = {}
        self.packets: dict[Role, list[bytes]] = {role: [] for role in Role}
        self.finished: set[tuple[Role, int]] = set()
        self.seen_end: set[tuple[Role, int]] = set()
        self.given_up: set[int] = set()  # streams that one end reset or refused
        self.filler = 0
        for code in self.table.streams:
            self.open_one(code, self.table.streams[code].most)
        self.settle()
        for number in list(self.unanswered):
            self.answer_one(number, 0)
        self.settle()

    def senders(self, number: int) -> list[Role]:
        """Who sends data on a stream."""
        sender = self.table.streams[self.kinds[number]].sender
        return list(Role) if sender is None else [sender]

    def some(self, data: st.DataObject) -> int | None:
        """A stream that was opened, mostly one that is still open, or None."""
        still = [number for number in self.numbers if any(end.is_open(number) for end in self.ends.values())]
        numbers = still or self.numbers
        if not numbers:
            return None
        return data.draw(st.sampled_from(numbers) | st.sampled_from(self.numbers))

    @rule(data=st.data())
    def open(self, data: st.DataObject) -> None:
        """Open a stream, if the table allows one more."""
        code = data.draw(st.sampled_from(list(self.table.streams)))
        kind = self.table.streams[code]
        end = self.ends[kind.opener]
        size = data.draw(st.integers(kind.least, kind.most))
        if sum(self.kinds[number] == code and end.is_open(number) for number in self.numbers) < kind.at_once:
            self.open_one(code, size)
        else:
            with pytest.raises(ChannelUsageError):
                end.open(code, bytes(size))

    def open_one(self, code: int, size: int) -> None:
        """Open a stream with a payload of this size."""
        number = self.ends[self.table.streams[code].opener].open(code, bytes(size))
        assert number not in self.kinds
        self.kinds[number] = code
        self.numbers.append(number)
        for role in self.senders(number):
            self.sent[role, number], self.came[role, number], self.used[role, number] = bytearray(), bytearray(), 0

    @rule(data=st.data(), code=st.sampled_from([0, 0, 0, 1]))
    def answer(self, data: st.DataObject, code: int) -> None:
        """Answer an opening that has arrived."""
        if self.unanswered:
            self.answer_one(data.draw(st.sampled_from(self.unanswered)), code)

    def answer_one(self, number: int, code: int) -> None:
        """Answer an opening."""
        self.unanswered.remove(number)
        end = self.ends[OTHER[self.table.streams[self.kinds[number]].opener]]
        if end.is_open(number) and code:
            self.given_up.add(number)
        end.answer(number, code)

    @rule(data=st.data(), role=ROLES, share=st.sampled_from([0.001, 0.3, 1, 3]))
    def give(self, data: st.DataObject, role: Role, share: float) -> None:
        """Offer data, more than the window at times."""
        number = self.some(data)
        if number is None:
            return
        end, size = self.ends[role], 1 + int(share * self.table.window)
        self.filler += 1
        content = bytes([self.filler % 256, self.filler * 7 % 256, 0]) * (size // 3 + 1)
        window = end.window(number)
        count = end.send(number, memoryview(content)[:size])
        assert count == min(size, window)
        if count:
            self.sent[role, number] += content[:count]
        packet = bytes([self.filler % 256]) * (self.filler % (self.table.datagram_max + 1) % 50)
        before = end.pending()
        end.send_datagram(number, packet)
        if end.pending() > before:
            self.packets[role].append(packet)

    @rule(data=st.data(), role=ROLES)
    def end(self, data: st.DataObject, role: Role) -> None:
        """End one side's data."""
        number = self.some(data)
        if number is None:
            return
        if role in self.senders(number) and self.ends[role].is_open(number) and not self.is_answered(number, role):
            with pytest.raises(ChannelUsageError):
                self.ends[role].finish(number)
            return
        was_open = self.ends[role].is_open(number)
        self.ends[role].finish(number)
        if was_open and role in self.senders(number):
            self.finished.add((role, number))

    def is_answered(self, number: int, role: Role) -> bool:
        """Return whether a stream needs no answer, or was answered as far as a role knows."""
        return self.ends[role]._open[number].opened  # noqa: SLF001 - no method of users tells it

    @rule(data=st.data(), role=ROLES, code=st.sampled_from([0, 5]))
    def reset(self, data: st.DataObject, role: Role, code: int) -> None:
        """Abort a stream, also one whose opening is still queued."""
        number = self.some(data)
        if number is not None and self.ends[role].is_open(number):
            self.ends[role].reset(number, code if self.table.code_max else 0)
            self.given_up.add(number)

    @rule(role=ROLES, data=st.data())
    def say(self, role: Role, data: st.DataObject) -> None:
        """Send a message."""
        code = data.draw(st.sampled_from(list(self.table.messages)))
        if self.table.messages[code].sender is role:
            self.ends[role].message(code, bytes(self.table.messages[code].least))

    @rule(most=st.sampled_from([1, 13, 70, 5000, 1 << 20]))
    def carry(self, most: int) -> None:
        """Both ends write and read."""
        for role in Role:
            self.write(role, most)
            self.read(role, most)

    @rule(role=ROLES, most=st.sampled_from([1, 13, 70, 5000, 1 << 20]))
    def write(self, role: Role, most: int) -> None:
        """The pipe takes some bytes."""
        data = self.ends[role].data_to_send()[:most]
        self.pipes[role] += data
        self.ends[role].sent(len(data))

    @rule(role=ROLES, most=st.sampled_from([1, 13, 70, 5000, 1 << 20]))
    def read(self, role: Role, most: int) -> None:
        """The other end reads some bytes."""
        data = bytes(self.pipes[role][:most])
        del self.pipes[role][:most]
        for event in self.ends[OTHER[role]].receive(data):
            self.take(role, event)

    def take(self, role: Role, event: Event) -> None:
        """Check an event from a role."""
        number = event.stream
        if event.type == OPEN:
            assert self.kinds[number] == event.code
            if self.table.streams[event.code].answered:
                self.unanswered.append(number)
        elif event.type == DATA:
            self.came[role, number] += event.data
        elif event.type == DATAGRAM:
            assert event.data in self.packets[role]
        elif event.type == FIN:
            assert (role, number) in self.finished
            self.seen_end.add((role, number))
        elif event.type == CREDIT:
            assert self.ends[OTHER[role]].window(number) >= 0
        elif event.type == RESET or (event.type == ANSWER and event.code):
            assert number in self.given_up
            assert not self.ends[OTHER[role]].is_open(number)

    @rule(data=st.data(), role=ROLES, share=st.sampled_from([0.001, 0.3, 1]))
    def use(self, data: st.DataObject, role: Role, share: float) -> None:
        """The reader of a role's data consumes some of it."""
        number = self.some(data)
        if number is not None and (role, number) in self.came:
            count = min(len(self.came[role, number]) - self.used[role, number], 1 + int(share * self.table.window))
            self.used[role, number] += count
            self.ends[OTHER[role]].consumed(number, count)

    def settle(self) -> None:
        """Carry until nothing moves."""
        while any(end.pending() for end in self.ends.values()) or any(self.pipes.values()):
            self.carry(1 << 20)

    @invariant()
    def in_order(self) -> None:
        """Received bytes are a prefix of the bytes sent, nothing follows an end, and windows hold."""
        for (role, number), came in self.came.items():
            sent = self.sent[role, number]
            assert sent.startswith(came)
            assert (role, number) not in self.seen_end or came == sent
            assert number in self.given_up or len(sent) - self.used[role, number] <= self.table.window

    @invariant()
    def bounded(self) -> None:
        """At most one frame is held, and no more streams are open than the table allows."""
        for role, end in self.ends.items():
            assert held(end) <= most_of(self.table, OTHER[role])
            for code, kind in self.table.streams.items():
                known = [number for number in self.numbers if self.kinds[number] == code and end.is_open(number)]
                assert len(known) <= kind.at_once

    def teardown(self) -> None:
        """Once everything is carried, every byte of a stream that nobody reset has arrived."""
        if not hasattr(self, "ends"):
            return
        for _ in range(3):
            self.settle()
            for role, number in self.came:
                count = len(self.came[role, number]) - self.used[role, number]
                self.used[role, number] += count
                self.ends[OTHER[role]].consumed(number, count)
        self.settle()
        self.in_order()
        for (role, number), came in self.came.items():
            if number not in self.given_up:
                assert came == self.sent[role, number]
                assert ((role, number) in self.seen_end) == ((role, number) in self.finished)
        assert len(self.ends[HOST]._open) == len(self.ends[GUEST]._open)  # noqa: SLF001 - both agree on what is open
        self.check_credit()

    def check_credit(self) -> None:
        """Check that once everything was consumed, the window and the credit that was not sent yet make a window."""
        for role, number in self.came:
            at_receiver = self.ends[OTHER[role]]._open.get(number)  # noqa: SLF001 - no method of users tells it
            window = self.ends[role].window(number)
            if at_receiver is not None and window:
                assert window + at_receiver.unacknowledged == self.table.window


def test_two_ends_deliver_every_byte_in_order() -> None:
    """All streams arrive whole, in order and within their windows, under any interleaving, cut, reset and stall."""
    run_state_machine_as_test(Exchange, settings=settings(stateful_step_count=40))
