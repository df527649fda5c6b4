"""Sessions: two links exchange messages and the streams of several commands, and everything arrives in order."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from tests.fuzz.fuzz_channel import DENIED, HELD_MAX, MESSAGES, NONCE, OPEN, check_remembered
from tests.unit.test_channel_link import AFTER_OPEN, CLOSED, GUEST, HOST, OPENER, OTHER, execute, pair_in, same
from tests.vm.programs.lies import EXITED
from x07_sandbox.channel import streams
from x07_sandbox.channel.link import WINDOW, CommandState, Link, State, Stream
from x07_sandbox.channel.messages import (
    FORMS,
    Changes,
    Close,
    Exec,
    Failed,
    Message,
    Output,
    Seed,
    Seeded,
    Started,
    Stop,
    Warm,
    Warmed,
)
from x07_sandbox.channel.streams import Event, Role
from x07_sandbox.errors import ChannelUsageError


class Sessions(RuleBasedStateMachine):
    """A host and a guest, several commands, and several sessions one after the other, over two pipes."""

    def __init__(self) -> None:
        super().__init__()
        self.ends = dict(zip(Role, pair_in(State.OPEN), strict=True))
        self.pipes = {role: bytearray() for role in Role}  # by writer
        self.said: dict[Role, list[Message]] = {role: [] for role in Role}  # and not received
        self.begin()

    def begin(self) -> None:
        """Forget the streams and commands of the session before, and start a first command."""
        self.sent: dict[int, bytearray] = {}
        self.came: dict[int, bytearray] = {}
        self.used: dict[int, int] = {}
        self.whole: set[int] = set()  # streams that have ended at their receiver
        self.finished: set[int] = set()
        self.dropped: set[int] = set()  # reset, or the input of a command that has ended
        self.subjects: dict[int, tuple[Stream, int]] = {}
        self.commands: dict[int, CommandState] = {}  # as the guest knows them
        self.next_id = 1
        self.close: Close | None = None  # as the guest knows it
        self.asked = 0  # for how many changes the guest was asked and has not sent them
        self.so_far: set[int] = set()  # streams of changes so far
        self.send_one()
        self.settle()
        self.start_one(1)

    def say(self, role: Role, one: Message) -> None:
        """Send a message."""
        self.ends[role].send(one)
        self.said[role].append(one)

    def open_stream(self, role: Role, stream: Stream, subject: int) -> None:
        """Open a stream, unless it was opened before."""
        if (stream, subject) in [of for number, of in self.subjects.items() if number not in self.so_far]:
            with pytest.raises(ChannelUsageError):
                self.ends[role].open(stream, subject)
            return
        self.note(self.ends[role].open(stream, subject), stream, subject)

    def note(self, number: int, stream: Stream, subject: int) -> None:
        """Note a stream that was opened."""
        self.subjects[number] = stream, subject
        self.sent[number], self.came[number], self.used[number] = bytearray(), bytearray(), 0

    # the host

    @rule(gap=st.sampled_from([0, 0, 2]))
    def execute(self, gap: int) -> None:
        """Send a command, and open its input."""
        if self.ends[HOST].state is not State.OPEN:
            with pytest.raises(ChannelUsageError):
                self.ends[HOST].send(execute(self.next_id))
            return
        self.send_one()
        self.next_id += gap

    def send_one(self) -> None:
        """Send the next command, and open its input."""
        self.say(HOST, execute(self.next_id))
        self.open_stream(HOST, Stream.STDIN, self.next_id)
        self.next_id += 1

    @rule(file=st.integers(0, 3))
    def send_file(self, file: int) -> None:
        """Open the stream of a file."""
        if self.ends[HOST].state in AFTER_OPEN:
            self.open_stream(HOST, Stream.INPUT, file)

    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        """Stop a command, which may have ended."""
        if self.commands and self.ends[HOST].state in {State.OPEN, State.CLOSING, State.CLOSED}:
            self.say(HOST, Stop(data.draw(st.sampled_from(list(self.commands))), 9))

    @rule(data=st.data())
    def close_session(self, data: st.DataObject) -> None:
        """Ask for the end, after a command or at once."""
        if self.ends[HOST].state is State.OPEN:
            after = data.draw(st.sampled_from([0, *self.commands]))
            self.say(HOST, Close(after, Output("/x07/out/a", 1), None))

    # the guest

    @rule(data=st.data(), good=st.sampled_from([True, True, True, False]))
    def start(self, data: st.DataObject, good: bool) -> None:  # noqa: FBT001 - as hypothesis gives it
        """A command starts or fails, and may open its output."""
        starting = [number for number, state in self.commands.items() if state is CommandState.STARTING]
        if not starting or self.ends[GUEST].state not in {State.OPEN, State.CLOSING}:
            return
        number = data.draw(st.sampled_from(starting))
        if not good:
            self.say(GUEST, Failed(number, "exec", 2, "no"))
            self.end_command(number)
            return
        self.start_one(number)

    def start_one(self, command: int) -> None:
        """A command starts, and opens its output."""
        self.say(GUEST, Started(command))
        self.commands[command] = CommandState.RUNNING
        self.open_stream(GUEST, Stream.STDOUT, command)

    @rule(data=st.data())
    def end_one(self, data: st.DataObject) -> None:
        """A command reports a denial and ends, once its output has ended."""
        running = [number for number, state in self.commands.items() if state is CommandState.RUNNING]
        if not running or self.ends[GUEST].state not in {State.OPEN, State.CLOSING}:
            return
        number = data.draw(st.sampled_from(running))
        self.say(GUEST, DENIED._replace(id=number))
        output = next(of for of, subject in self.subjects.items() if subject == (Stream.STDOUT, number))
        if self.ends[GUEST].streams.is_open(output):
            with pytest.raises(ChannelUsageError):
                self.ends[GUEST].send(EXITED._replace(id=number))
            self.ends[GUEST].streams.finish(output)
            self.finished.add(output)
        self.say(GUEST, EXITED._replace(id=number))
        self.end_command(number)

    def end_command(self, command: int) -> None:
        """Note that a command has ended."""
        self.commands[command] = CommandState.ENDED
        self.dropped |= {number for number, of in self.subjects.items() if of == (Stream.STDIN, command)}

    @rule()
    def ask(self) -> None:
        """Ask for the changes so far."""
        if self.ends[HOST].state is State.OPEN:
            self.say(HOST, Changes())

    @rule()
    def send_so_far(self) -> None:
        """Send the changes so far, if the guest was asked for them."""
        if self.asked:
            self.finish_so_far()
            number = self.ends[GUEST].open(Stream.CHANGES)
            self.asked -= 1
            self.so_far.add(number)
            self.note(number, Stream.CHANGES, 0)

    def finish_so_far(self) -> None:
        """End the streams of changes so far."""
        for number in self.so_far:
            self.ends[GUEST].streams.finish(number)
            self.finished.add(number)

    @rule()
    def send_changes(self) -> None:
        """Open the streams of the end, or end them and report that all was sent."""
        guest = self.ends[GUEST]
        if guest.state is not State.CLOSING or self.close is None:
            return
        if self.close.after and self.commands[self.close.after] is not CommandState.ENDED:
            return
        if self.asked:
            return
        self.finish_so_far()
        mine = [number for number, (stream, _) in self.subjects.items() if stream in {Stream.OUTPUT, Stream.CHANGES}]
        mine = [number for number in mine if number not in self.so_far]
        if not mine:
            self.open_stream(GUEST, Stream.OUTPUT, 0)
            self.open_stream(GUEST, Stream.CHANGES, 0)
            return
        for number in mine:
            guest.streams.finish(number)
            self.finished.add(number)
        self.say(GUEST, CLOSED)

    # both

    @rule(data=st.data(), size=st.integers(1, 2 * WINDOW), fill=st.integers(0, 255))
    def give(self, data: st.DataObject, size: int, fill: int) -> None:
        """Offer data, more than the window at times."""
        if not self.subjects:
            return
        number = data.draw(st.sampled_from(list(self.subjects)))
        link = self.ends[OPENER[self.subjects[number][0]]]
        content = bytes([fill, (fill * 7 + 1) % 256, 0]) * (size // 3 + 1)
        window = link.streams.window(number)
        count = link.streams.send(number, memoryview(content)[:size])
        assert count == min(size, window)
        self.sent[number] += content[:count]

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        """End a stream."""
        if self.subjects:
            number = data.draw(st.sampled_from(list(self.subjects)))
            self.ends[OPENER[self.subjects[number][0]]].streams.finish(number)
            self.finished.add(number)

    @rule(data=st.data(), role=st.sampled_from(Role))
    def reset(self, data: st.DataObject, role: Role) -> None:
        """Abort a stream."""
        if self.subjects:
            number = data.draw(st.sampled_from(list(self.subjects)))
            self.ends[role].streams.reset(number)
            self.dropped.add(number)

    @rule(data=st.data(), share=st.sampled_from([0.001, 0.3, 1]))
    def use(self, data: st.DataObject, share: float) -> None:
        """The reader of a stream consumes some of it."""
        if self.subjects:
            number = data.draw(st.sampled_from(list(self.subjects)))
            count = min(len(self.came[number]) - self.used[number], 1 + int(share * WINDOW))
            self.used[number] += count
            self.ends[OTHER[OPENER[self.subjects[number][0]]]].streams.consumed(number, count)

    @rule(most=st.sampled_from([1, 13, 5000, 1 << 20]))
    def carry(self, most: int) -> None:
        """Both ends write and read."""
        for role in Role:
            self.write(role, most)
            self.read(role, most)

    @rule(role=st.sampled_from(Role), most=st.sampled_from([1, 13, 5000, 1 << 20]))
    def write(self, role: Role, most: int) -> None:
        """The pipe takes some bytes."""
        data = self.ends[role].streams.data_to_send()[:most]
        self.pipes[role] += data
        self.ends[role].streams.sent(len(data))

    @rule(role=st.sampled_from(Role), most=st.sampled_from([1, 13, 5000, 1 << 20]))
    def read(self, role: Role, most: int) -> None:
        """The other end reads some bytes."""
        data = bytes(self.pipes[role][:most])
        del self.pipes[role][:most]
        link = self.ends[OTHER[role]]
        for event in link.receive(data):
            if isinstance(event, Event):
                self.take_event(link, event)
            else:
                self.take_message(event, self.said[role].pop(0))

    def take_message(self, one: Message, expected: Message) -> None:
        """Check a message that has arrived."""
        assert same([one], [expected])
        if isinstance(one, Exec):
            self.commands[one.id] = CommandState.STARTING
        elif isinstance(one, Close):
            self.close = one
        elif isinstance(one, Changes):
            self.asked += 1

    def take_event(self, link: Link, event: Event) -> None:
        """Check an event of a stream that has arrived at a link."""
        if event.type == streams.OPEN:
            stream, subject = self.subjects[event.stream]
            assert (stream, subject) == (event.code, link.subject(event.stream))
            if stream is Stream.STDIN and self.commands[subject] is CommandState.ENDED:
                link.streams.reset(event.stream)
        elif event.type == streams.DATA:
            self.came[event.stream] += event.data
        elif event.type == streams.FIN:
            assert event.stream in self.finished
            self.whole.add(event.stream)
        elif event.type == streams.RESET:
            assert event.stream in self.dropped

    @rule()
    def start_anew(self) -> None:
        """Once the session is closed and all was carried, the host's own warm-up program has run: start anew."""
        if self.ends[HOST].state is not State.CLOSED:
            return
        self.settle()
        self.check_whole()
        for one in (MESSAGES[Warm], Warmed(), MESSAGES[Seed], Seeded(NONCE), OPEN):
            self.say(FORMS[type(one)].sender, one)
            self.settle()
        self.begin()

    def settle(self) -> None:
        """Carry until nothing moves."""
        while any(link.pending() for link in self.ends.values()) or any(self.pipes.values()):
            self.carry(1 << 20)

    @invariant()
    def in_order(self) -> None:
        """Received bytes are a prefix of the bytes sent, nothing follows the end, and windows and memory hold."""
        for number, came in self.came.items():
            assert self.sent[number].startswith(came)
            assert number not in self.whole or came == self.sent[number]
            assert number in self.dropped or len(self.sent[number]) - self.used[number] <= WINDOW
        for role, link in self.ends.items():
            check_remembered(link)
            assert len(link.streams._in) <= HELD_MAX[role]  # noqa: SLF001 - the bound on it is the promise

    def check_whole(self) -> None:
        """Check that every byte of a stream that was not dropped has arrived, and every message."""
        self.in_order()
        assert self.said == {role: [] for role in Role}
        for number, came in self.came.items():
            if number not in self.dropped:
                assert came == self.sent[number]
                assert (number in self.whole) == (number in self.finished)
        assert self.ends[HOST].state is self.ends[GUEST].state

    def teardown(self) -> None:
        """Once everything is carried, everything has arrived."""
        self.settle()
        self.check_whole()


def test_two_ends_deliver_every_message_and_byte_in_order() -> None:
    """Messages and streams of several commands and sessions arrive whole, in order and within their windows."""
    run_state_machine_as_test(Sessions, settings=settings(stateful_step_count=60))
