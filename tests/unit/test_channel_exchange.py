"""Exchanges: two ends with any table, and every byte that one sends arrives at the other in order."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule, run_state_machine_as_test

from tests.guest.joined import ROLES, TABLES, Joined
from tests.guest.messages import GUEST, HOST, OTHER
from x07_sandbox.channel.messages import Message
from x07_sandbox.channel.streams import ANSWER, CREDIT, DATAGRAM, OPEN, RESET, Event, Role, Streams
from x07_sandbox.errors import ChannelUsageError


class Exchange(Joined):
    """Two ends with any table, all of whose features they use."""

    @initialize(name=st.sampled_from(list(TABLES)))
    def begin(self, name: str) -> None:
        """Choose the table, and open a stream of each kind."""
        self.join(TABLES[name], {role: Streams(role, TABLES[name]) for role in Role})
        self.unanswered: list[int] = []
        self.packets: dict[Role, list[bytes]] = {role: [] for role in Role}
        for code in self.table.streams:
            self.open_one(code, self.table.streams[code].most)
        self.settle()
        for number in list(self.unanswered):
            self.answer_one(number, 0)
        self.settle()

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

    def open_one(self, code: int, size: int) -> None:
        """Open a stream with a payload of this size."""
        self.note(self.ends[self.table.streams[code].opener].open(code, bytes(size)), code)

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
        end.answer(number, code)

    @rule(data=st.data(), role=ROLES)
    def send_datagram(self, data: st.DataObject, role: Role) -> None:
        """Offer a datagram, which is sent only on a stream of datagrams."""
        number = self.some(data)
        if number is None:
            return
        self.filler += 1
        packet = bytes([self.filler % 256]) * (self.filler % (self.table.datagram_max + 1) % 50)
        before = self.ends[role].pending()
        self.ends[role].send_datagram(number, packet)
        if self.ends[role].pending() > before:
            self.packets[role].append(packet)

    @rule(role=ROLES, data=st.data())
    def say(self, role: Role, data: st.DataObject) -> None:
        """Send a message."""
        code = data.draw(st.sampled_from(list(self.table.messages)))
        if self.table.messages[code].sender is role:
            self.ends[role].message(code, bytes(self.table.messages[code].least))

    def take(self, role: Role, event: Message | Event) -> None:
        """Check an event from a role."""
        assert isinstance(event, Event)
        number = event.stream
        super().take(role, event)
        if event.type == OPEN:
            assert self.kinds[number] == event.code
            if self.table.streams[event.code].answered:
                self.unanswered.append(number)
        elif event.type == DATAGRAM:
            assert event.data in self.packets[role]
        elif event.type == CREDIT:
            assert self.ends[OTHER[role]].window(number) >= 0
        elif event.type == RESET or (event.type == ANSWER and event.code):
            assert number in self.dropped
            assert not self.ends[OTHER[role]].is_open(number)

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
