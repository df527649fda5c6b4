"""Sessions: two links exchange messages and the streams of several commands, and everything arrives in order."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule, run_state_machine_as_test

from tests.guest.joined import Joined
from tests.guest.lies import CLOSED, DENIED, EXITED
from tests.guest.messages import (
    AFTER_OPEN,
    GUEST,
    HOST,
    MESSAGES,
    NONCE,
    OPEN,
    OTHER,
    check_remembered,
    execute,
    pair_in,
    same,
)
from x07_sandbox.channel import streams
from x07_sandbox.channel.link import STREAMS, CommandState, State, Stream
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


class Sessions(Joined):
    """A host and a guest, several commands, and several sessions one after the other, over two pipes."""

    def __init__(self) -> None:
        super().__init__()
        self.links = dict(zip(Role, pair_in(State.OPEN), strict=True))
        self.join(STREAMS, {role: link.streams for role, link in self.links.items()})
        self.said: dict[Role, list[Message]] = {role: [] for role in Role}  # and not received
        self.begin()

    def begin(self) -> None:
        """Forget the streams and commands of the session before, and start a first command."""
        self.forget()
        self.subjects: dict[int, tuple[Stream, int]] = {}
        self.commands: dict[int, CommandState] = {}  # as the guest knows them
        self.next_id = 1
        self.close: Close | None = None  # as the guest knows it
        self.asked = 0  # for how many changes the guest was asked and has not sent them
        self.so_far: set[int] = set()  # streams of changes so far
        self.send_one()
        self.settle()
        self.start_one(1)

    def say(self, one: Message) -> None:
        """Send a message."""
        sender = FORMS[type(one)].sender
        self.links[sender].send(one)
        self.said[sender].append(one)

    def open_stream(self, role: Role, stream: Stream, subject: int) -> None:
        """Open a stream, unless it was opened before."""
        if (stream, subject) in [of for number, of in self.subjects.items() if number not in self.so_far]:
            with pytest.raises(ChannelUsageError):
                self.links[role].open(stream, subject)
            return
        self.note_subject(self.links[role].open(stream, subject), stream, subject)

    def note_subject(self, number: int, stream: Stream, subject: int) -> None:
        """Note a stream that was opened."""
        self.subjects[number] = stream, subject
        self.note(number, stream)

    # the host

    @rule(gap=st.sampled_from([0, 0, 2]))
    def execute(self, gap: int) -> None:
        """Send a command, and open its input."""
        if self.links[HOST].state is not State.OPEN:
            with pytest.raises(ChannelUsageError):
                self.links[HOST].send(execute(self.next_id))
            return
        self.send_one()
        self.next_id += gap

    def send_one(self) -> None:
        """Send the next command, and open its input."""
        self.say(execute(self.next_id))
        self.open_stream(HOST, Stream.STDIN, self.next_id)
        self.next_id += 1

    @rule(file=st.integers(0, 3))
    def send_file(self, file: int) -> None:
        """Open the stream of a file."""
        if self.links[HOST].state in AFTER_OPEN:
            self.open_stream(HOST, Stream.INPUT, file)

    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        """Stop a command, which may have ended."""
        if self.commands and self.links[HOST].state in {State.OPEN, State.CLOSING, State.CLOSED}:
            self.say(Stop(data.draw(st.sampled_from(list(self.commands))), 9))

    @rule(data=st.data())
    def close_session(self, data: st.DataObject) -> None:
        """Ask for the end, after a command or at once."""
        if self.links[HOST].state is State.OPEN:
            after = data.draw(st.sampled_from([0, *self.commands]))
            self.say(Close(after, Output("/x07/out/a", 1), None))

    # the guest

    def one_of(self, data: st.DataObject, state: CommandState) -> int | None:
        """Return a command in that state, if there is one and the guest may speak of it."""
        found = [number for number, its in self.commands.items() if its is state]
        may = found and self.links[GUEST].state in {State.OPEN, State.CLOSING}
        return data.draw(st.sampled_from(found)) if may else None

    @rule(data=st.data(), good=st.sampled_from([True, True, True, False]))
    def start(self, data: st.DataObject, good: bool) -> None:  # noqa: FBT001 - as hypothesis gives it
        """A command starts or fails, and may open its output."""
        number = self.one_of(data, CommandState.STARTING)
        if number is not None and good:
            self.start_one(number)
        elif number is not None:
            self.say(Failed(number, "exec", 2, "no"))
            self.end_command(number)

    def start_one(self, command: int) -> None:
        """A command starts, and opens its output."""
        self.say(Started(command))
        self.commands[command] = CommandState.RUNNING
        self.open_stream(GUEST, Stream.STDOUT, command)

    @rule(data=st.data())
    def end_one(self, data: st.DataObject) -> None:
        """A command reports a denial and ends, once its output has ended."""
        number = self.one_of(data, CommandState.RUNNING)
        if number is None:
            return
        self.say(DENIED._replace(id=number))
        output = next(of for of, subject in self.subjects.items() if subject == (Stream.STDOUT, number))
        if self.ends[GUEST].is_open(output):
            with pytest.raises(ChannelUsageError):
                self.links[GUEST].send(EXITED._replace(id=number))
            self.finish_one(GUEST, output)
        self.say(EXITED._replace(id=number))
        self.end_command(number)

    def end_command(self, command: int) -> None:
        """Note that a command has ended."""
        self.commands[command] = CommandState.ENDED
        self.dropped |= {number for number, of in self.subjects.items() if of == (Stream.STDIN, command)}

    @rule()
    def ask(self) -> None:
        """Ask for the changes so far."""
        if self.links[HOST].state is State.OPEN:
            self.say(Changes())

    @rule()
    def send_so_far(self) -> None:
        """Send the changes so far, if the guest was asked for them."""
        if self.asked:
            self.finish_so_far()
            number = self.links[GUEST].open(Stream.CHANGES)
            self.asked -= 1
            self.so_far.add(number)
            self.note_subject(number, Stream.CHANGES, 0)

    def finish_so_far(self) -> None:
        """End the streams of changes so far."""
        for number in self.so_far:
            self.finish_one(GUEST, number)

    @rule()
    def send_changes(self) -> None:
        """Open the streams of the end, or end them and report that all was sent."""
        if self.links[GUEST].state is not State.CLOSING or self.close is None or self.asked:
            return
        if self.close.after and self.commands[self.close.after] is not CommandState.ENDED:
            return
        self.finish_so_far()
        mine = [number for number, (stream, _) in self.subjects.items() if stream in {Stream.OUTPUT, Stream.CHANGES}]
        mine = [number for number in mine if number not in self.so_far]
        if not mine:
            self.open_stream(GUEST, Stream.OUTPUT, 0)
            self.open_stream(GUEST, Stream.CHANGES, 0)
            return
        for number in mine:
            self.finish_one(GUEST, number)
        self.say(CLOSED)

    # both

    def events(self, role: Role, data: bytes) -> Iterator[Message | Event]:
        """Return what the bytes mean at an end."""
        return self.links[role].receive(data)

    def take(self, role: Role, event: Message | Event) -> None:
        """Check a message or an event from a role."""
        if not isinstance(event, Event):
            self.take_message(event, self.said[role].pop(0))
            return
        super().take(role, event)
        if event.type == streams.OPEN:
            link, (stream, subject) = self.links[OTHER[role]], self.subjects[event.stream]
            assert (stream, subject) == (event.code, link.subject(event.stream))
            if stream is Stream.STDIN and self.commands[subject] is CommandState.ENDED:
                link.streams.reset(event.stream)

    def take_message(self, one: Message, expected: Message) -> None:
        """Check a message that has arrived."""
        assert same([one], [expected])
        if isinstance(one, Exec):
            self.commands[one.id] = CommandState.STARTING
        elif isinstance(one, Close):
            self.close = one
        elif isinstance(one, Changes):
            self.asked += 1

    @rule()
    def start_anew(self) -> None:
        """Once the session is closed and all was carried, the host's own warm-up program has run: start anew."""
        if self.links[HOST].state is not State.CLOSED:
            return
        self.settle()
        self.check_whole()
        for one in (MESSAGES[Warm], Warmed(), MESSAGES[Seed], Seeded(NONCE), OPEN):
            self.say(one)
            self.settle()
        self.begin()

    @invariant()
    def bounded(self) -> None:
        """Both ends remember a limited number of streams and commands."""
        for link in self.links.values():
            check_remembered(link)

    def check_whole(self) -> None:
        """Check that every byte of a stream that was not dropped has arrived, and every message."""
        super().check_whole()
        assert self.said == {role: [] for role in Role}
        assert self.links[HOST].state is self.links[GUEST].state

    def teardown(self) -> None:
        """Once everything is carried, everything has arrived."""
        self.settle()
        self.check_whole()


def test_two_ends_deliver_every_message_and_byte_in_order() -> None:
    """Messages and streams of several commands and sessions arrive whole, in order and within their windows."""
    run_state_machine_as_test(Sessions, settings=settings(stateful_step_count=60))
