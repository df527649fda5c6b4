"""Exchanges: two ends with any table, and every byte that one sends arrives at the other in order."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.guest.messages import GUEST, HOST, OTHER
from tests.guest.tables import ROLES, SIZES, TABLES, held, most_of
from x07_sandbox.channel.streams import ANSWER, CREDIT, DATA, DATAGRAM, FIN, MESSAGE, OPEN, RESET, Event, Role, Streams
from x07_sandbox.errors import ChannelUsageError


class Exchange(RuleBasedStateMachine):
    """Two ends with any table, all of whose features they use, joined by two pipes."""

    @initialize(name=st.sampled_from(list(TABLES)))
    def begin(self, name: str) -> None:
        """Choose the table, and open a stream of each kind."""
        self.table = TABLES[name]
        self.ends = {role: Streams(role, self.table) for role in Role}
        self.pipes = {role: bytearray() for role in Role}  # by writer
        self.filler = 0
        self.kinds: dict[int, int] = {}
        self.sent: dict[tuple[Role, int], bytearray] = {}
        self.came: dict[tuple[Role, int], bytearray] = {}  # by sender
        self.used: dict[tuple[Role, int], int] = {}
        self.finished: set[tuple[Role, int]] = set()
        self.whole: set[tuple[Role, int]] = set()  # that have ended at their receiver
        self.dropped: set[int] = set()  # streams that were reset or refused
        self.unanswered: list[int] = []
        self.payloads: dict[int, bytes] = {}
        self.codes: dict[int, set[int]] = {}  # with which a stream was reset or refused
        self.packets: dict[tuple[Role, int], list[bytes]] = {}  # that were sent and have not come
        self.said: dict[Role, list[Event]] = {role: [] for role in Role}
        for code in self.table.streams:
            self.try_kind(code)
        for code in self.table.streams:
            self.open_answered(code)

    def try_kind(self, code: int) -> None:
        """Refuse a stream of a kind, reset others with frames on their way, send datagrams, and end one."""
        opener, reason = self.table.streams[code].opener, min(5, self.table.code_max)
        if self.table.streams[code].answered:
            number = self.open_one(code, self.table.streams[code].most)
            self.settle()
            self.answer_one(number, reason)
            self.settle()
        self.reset_one(
            opener, self.open_one(code, self.table.streams[code].most), reason
        )  # its opening is still queued
        self.settle()
        number = self.open_answered(code)
        self.give_one(opener, number, self.table.window + 1)
        self.datagram(opener, number, 1)
        self.finish_one(opener, number)
        self.reset_one(OTHER[opener], number, reason)
        self.settle()
        number = self.open_answered(code)
        for size in (0, self.table.datagram_max, self.table.datagram_max + 1):
            self.datagram(opener, number, size)
        for role in Role:
            self.finish_one(role, number)
        self.settle()
        assert not any(end.is_open(number) for end in self.ends.values())

    def open_answered(self, code: int) -> int:
        """Open a stream, and have it answered if its kind needs that."""
        number = self.open_one(code, self.table.streams[code].most)
        for role in Role:
            self.give_one(role, number, 1)
            self.datagram(role, number, 1)
        self.settle()
        if number in self.unanswered:
            self.answer_one(number, 0)
            self.settle()
        return number

    def open_now(self, end: Streams, code: int) -> int:
        """Return how many streams of a kind are open at one end."""
        return sum(kind == code and end.is_open(number) for number, kind in self.kinds.items())

    @rule(data=st.data())
    def open(self, data: st.DataObject) -> None:
        """Open a stream, if the table allows one more."""
        code = data.draw(st.sampled_from(list(self.table.streams)))
        kind = self.table.streams[code]
        size = data.draw(st.integers(kind.least, kind.most))
        if self.open_now(self.ends[kind.opener], code) < kind.at_once:
            self.open_one(code, size)
        else:
            with pytest.raises(ChannelUsageError):
                self.ends[kind.opener].open(code, bytes(size))

    def open_one(self, code: int, size: int) -> int:
        """Open a stream with a payload of this size."""
        self.filler += 1
        payload = bytes([self.filler % 256]) * size
        number = self.ends[self.table.streams[code].opener].open(code, payload)
        assert number not in self.kinds
        self.kinds[number], self.payloads[number] = code, payload
        sender = self.table.streams[code].sender
        for role in Role if sender is None else (sender,):
            self.sent[role, number], self.came[role, number], self.used[role, number] = bytearray(), bytearray(), 0
        return number

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
            self.dropped.add(number)
            self.codes.setdefault(number, set()).add(code)
        end.answer(number, code)

    @rule(data=st.data(), role=ROLES)
    def send_datagram(self, data: st.DataObject, role: Role) -> None:
        """Offer a datagram, which is sent only on a stream of datagrams, and only if it is not too large."""
        number = self.some(data)
        if number is not None:
            self.datagram(role, number, data.draw(st.integers(0, 50)))

    def datagram(self, role: Role, number: int, size: int) -> None:
        """Offer a datagram of this size."""
        self.filler += 1
        before = self.ends[role].pending()
        self.ends[role].send_datagram(number, bytes([self.filler % 256]) * size)
        if self.ends[role].pending() > before:
            assert size <= self.table.datagram_max
            assert self.ends[role]._open[number].opened  # noqa: SLF001 - no method of users tells it
            assert self.table.streams[self.kinds[number]].datagrams
            self.packets.setdefault((role, number), []).append(bytes([self.filler % 256]) * size)

    @rule(role=ROLES, data=st.data())
    def say(self, role: Role, data: st.DataObject) -> None:
        """Send a message."""
        code = data.draw(st.sampled_from(list(self.table.messages)))
        form = self.table.messages[code]
        if form.sender is role:
            self.filler += 1
            payload = bytes([self.filler % 256]) * form.least
            self.ends[role].message(code, payload)
            self.said[role].append(Event(MESSAGE, 0, code, payload))

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
        self.codes.setdefault(number, set()).add(code)

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
        for event in self.ends[OTHER[role]].receive(data):
            self.take(role, event)

    def take(self, role: Role, event: Event) -> None:
        """Check an event from a role."""
        number = event.stream
        if event.type == DATA:
            self.came[role, number] += event.data
        elif event.type == FIN:
            assert (role, number) in self.finished
            self.whole.add((role, number))
        elif event.type == MESSAGE:
            assert event == self.said[role].pop(0)
        elif event.type == OPEN:
            assert event == Event(OPEN, number, self.kinds[number], self.payloads[number])
            if self.table.streams[event.code].answered:
                self.unanswered.append(number)
        elif event.type == DATAGRAM:
            assert event.data == self.packets[role, number].pop(0)
        elif event.type == CREDIT:
            assert self.ends[OTHER[role]].window(number) >= 0
        elif event.type == RESET or (event.type == ANSWER and event.code):
            assert number in self.dropped
            assert event.code in self.codes[number]
            assert not self.ends[OTHER[role]].is_open(number)

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

    @invariant()
    def bounded(self) -> None:
        """No more streams are open than the table allows."""
        for end in self.ends.values():
            assert all(self.open_now(end, code) <= kind.at_once for code, kind in self.table.streams.items())

    def teardown(self) -> None:
        """Once everything is carried, every byte of a stream that nobody reset has arrived."""
        if not hasattr(self, "ends"):
            return
        for _ in range(3):
            self.settle()
            for role, number in self.came:
                self.use_one(role, number, len(self.came[role, number]))
        self.settle()
        self.check_whole()
        assert self.said == {role: [] for role in Role}
        assert not any(packets for (_, number), packets in self.packets.items() if number not in self.dropped)
        for number in self.kinds:
            if {(role, number) for role in Role if (role, number) in self.sent} <= self.finished:
                assert not any(end.is_open(number) for end in self.ends.values())
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
