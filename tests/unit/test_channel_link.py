"""The link: two ends, the tables of states, the streams of commands, and final faults."""

from __future__ import annotations

from typing import Any, Final

import pytest

from tests.guest.lies import CLOSED, EXITED
from tests.guest.messages import (
    AFTER_OPEN,
    CLOSE_NOW,
    GUEST,
    HOST,
    MESSAGES,
    NONCE,
    OPEN,
    OPENER,
    SITUATIONS,
    carry,
    check_remembered,
    exchange,
    execute,
    frame,
    link_in,
    message,
    opening,
    pair_in,
    same,
    taken,
)
from x07_sandbox.channel import streams
from x07_sandbox.channel.link import (
    COMMAND_NEXT,
    COMMANDS_MAX,
    FILES_MAX,
    NEXT,
    WINDOW,
    CommandState,
    Link,
    State,
    Stream,
)
from x07_sandbox.channel.messages import (
    FORMS,
    ID_MAX,
    Changes,
    Exec,
    Failed,
    Held,
    Hello,
    Message,
    Seed,
    Seeded,
    Started,
    Stop,
    Warm,
    Warmed,
)
from x07_sandbox.channel.streams import Event, Role
from x07_sandbox.errors import ChannelUsageError, PeerError

OF_COMMANDS: Final = (Stream.STDIN, Stream.STDOUT, Stream.STDERR)
ALL_MESSAGES: Final = {
    **{kind.__name__: one for kind, one in MESSAGES.items()},
    "FailedCommand": Failed(1, "exec", 2, "no"),
    "NextExec": MESSAGES[Exec]._replace(id=2),  # type: ignore[call-arg]
}


def in_order(state: State, command: CommandState | None, one: Message) -> State | None:
    """Return the state of the session after a message, or None if it is out of order."""
    after = NEXT.get((state, type(one)))
    about = getattr(one, "id", 0)
    if isinstance(one, Held):  # nothing is held otherwise
        return after if state is State.HOLDING else None
    if isinstance(one, Exec):
        return after if about > (command is not None) else None
    if about and (command is None or (command, type(one)) not in COMMAND_NEXT):
        return None
    return state if after and isinstance(one, Failed) and about else after


def may_open(state: State, command: CommandState | None, stream: Stream, role: Role) -> bool:
    """Return whether a stream may be opened. role: who decides that."""
    if stream is Stream.INPUT:
        return state in AFTER_OPEN
    if stream is Stream.STDIN:
        late = role is GUEST and command is CommandState.ENDED  # the guest may have ended it meanwhile
        return command in {CommandState.STARTING, CommandState.RUNNING} or late
    if stream in OF_COMMANDS:
        return command is CommandState.RUNNING
    return state is State.CLOSING or (stream is Stream.RELAY and state is State.OPEN)


def subject_of(stream: Stream) -> int:
    """A good subject of a stream."""
    return 1 if stream in OF_COMMANDS else 0


# the tables of states


def test_every_state_can_be_reached_and_left() -> None:
    """Every state of a session and of a command is reachable and has a transition."""
    for states, table, first in ((State, NEXT, State.WAITING), (CommandState, COMMAND_NEXT, CommandState.STARTING)):
        reached: set[Any] = {first}
        while more := {end for (begin, _), end in table.items() if begin in reached} - reached:
            reached |= more
        assert reached == set(states)
        assert {begin for begin, _ in table} == set(states)


def test_the_guest_speaks_first() -> None:
    """Only the guest's HELLO opens a conversation."""
    assert [(kind, FORMS[kind].sender) for state, kind in NEXT if state is State.WAITING] == [(Hello, GUEST)]


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize(("state", "command"), SITUATIONS)
def test_messages_follow_the_tables(state: State, command: CommandState | None, role: Role) -> None:
    """A message follows the tables of states; else a received one raises PeerError, and no other is sent."""
    for name, one in ALL_MESSAGES.items():
        sender, receiver = link_in(role, state, command), link_in(role, state, command)
        after = in_order(state, command, one)
        if after is not None and FORMS[type(one)].sender is role:
            sender.send(one)
            assert (sender.state, taken(sender)) == (after, message(one)), name
        else:
            with pytest.raises(ChannelUsageError):
                sender.send(one)
            assert (sender.state, sender.pending()) == (state, 0), name
        if after is not None and FORMS[type(one)].sender is not role:
            assert same(list(receiver.receive(message(one))), [one]), name
            assert receiver.state is after, name
        else:
            with pytest.raises(PeerError):
                list(receiver.receive(message(one)))
            assert receiver.state is state, name


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("stream", Stream)
@pytest.mark.parametrize(("state", "command"), SITUATIONS)
def test_streams_follow_the_tables(state: State, command: CommandState | None, stream: Stream, role: Role) -> None:
    """A stream is opened by its sender, and only while the session or its command is in the right state."""
    subject, good = subject_of(stream), may_open(state, command, stream, role)
    link = link_in(role, state, command)
    if OPENER[stream] is role and good:
        number = link.open(stream, subject)
        assert taken(link) == opening(number, stream, subject)
        assert link.subject(number) == subject
    else:
        with pytest.raises(ChannelUsageError):
            link.open(stream, subject)
        assert link.pending() == 0
    link = link_in(role, state, command)
    number = 2 if OPENER[stream] is HOST else 1
    wire = opening(number, stream, subject)
    if OPENER[stream] is not role and good:
        assert list(link.receive(wire)) == [Event(streams.OPEN, number, stream, subject.to_bytes(4, "big"))]
        assert link.subject(number) == subject
    else:
        with pytest.raises(PeerError):
            list(link.receive(wire))


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("stream", Stream)
def test_a_stream_is_opened_once(stream: Stream, ended: bool) -> None:  # noqa: FBT001 - as pytest gives it
    """A stream of a subject is opened once, also after it has ended."""
    host, guest = pair_in(State.CLOSING, CommandState.RUNNING)
    by, to = (host, guest) if OPENER[stream] is HOST else (guest, host)
    number = by.open(stream, subject_of(stream))
    if ended:
        by.streams.finish(number)
    carry(by, to)
    with pytest.raises(ChannelUsageError):
        by.open(stream, subject_of(stream))
    assert by.pending() == 0
    with pytest.raises(PeerError):
        list(to.receive(opening(number + 2, stream, subject_of(stream))))


@pytest.mark.parametrize(
    ("stream", "subject"),
    [
        (Stream.INPUT, FILES_MAX),
        (Stream.INPUT, 2**32 - 1),
        (Stream.STDIN, 0),
        (Stream.STDIN, 2),
        (Stream.STDOUT, 0),
        (Stream.STDERR, 2),
        (Stream.OUTPUT, 1),
        (Stream.CHANGES, 1),
        (Stream.LEFT, 2**32 - 1),
        (Stream.INPUT, -1),
        (Stream.STDOUT, 2**32),
    ],
)
def test_a_stream_has_a_known_subject(stream: Stream, subject: int) -> None:
    """A stream of an unknown file or command, or of what is no number of 32 bits, is neither opened nor accepted."""
    host, guest = pair_in(State.CLOSING, CommandState.RUNNING)
    by, to = (host, guest) if OPENER[stream] is HOST else (guest, host)
    with pytest.raises(ChannelUsageError):
        by.open(stream, subject)
    assert by.pending() == 0
    with pytest.raises(PeerError):
        list(to.receive(opening(2 if by is host else 1, stream, subject % 2**32)))


# commands


@pytest.mark.parametrize("number", [0, 1, -1, ID_MAX + 1])
def test_an_id_that_is_not_higher_is_an_error(number: int) -> None:
    """The id of a command is above zero, higher than the one before, and a number of 32 bits."""
    host, guest = pair_in(State.OPEN, CommandState.RUNNING)
    with pytest.raises(ChannelUsageError, match="cannot be added"):
        host.send(execute(number))
    assert host.pending() == 0
    with pytest.raises(PeerError, match="cannot be added"):
        list(guest.receive(message(execute(number))))
    host.send(execute(ID_MAX))  # ids may have gaps


def test_commands_at_once_are_limited() -> None:
    """At most 64 commands exist at the same time; the end of one makes room for another."""
    host, guest = pair_in(State.OPEN)
    for number in range(1, COMMANDS_MAX + 1):
        host.send(execute(number))
    carry(host, guest)
    with pytest.raises(ChannelUsageError):
        host.send(execute(COMMANDS_MAX + 1))
    hostile = link_in(GUEST, State.OPEN)
    list(hostile.receive(b"".join(message(execute(number)) for number in range(1, COMMANDS_MAX + 1))))
    with pytest.raises(PeerError):
        list(hostile.receive(message(execute(COMMANDS_MAX + 1))))
    guest.send(Failed(7, "exec", 2, "no"))
    carry(guest, host)
    host.send(execute(COMMANDS_MAX + 1))
    assert len(carry(host, guest)) == 1


def test_thousands_of_commands_leave_nothing_behind() -> None:
    """Ended commands, some with input that came too late, cost no memory at either end."""
    host, guest = pair_in(State.OPEN)
    for number in range(1, 3001):
        host.send(execute(number))
        host.open(Stream.STDIN, number)
        early = taken(host)
        if number % 3:
            list(guest.receive(early))
            guest.send(Started(number))
            for stream in (Stream.STDOUT, Stream.STDERR):
                output = guest.open(stream, number)
                guest.streams.send(output, b"x")
                guest.streams.finish(output)
            guest.send(EXITED._replace(id=number))
        else:  # the input comes after the end
            exec_frame = message(execute(number))
            list(guest.receive(exec_frame))
            guest.send(Failed(number, "exec", 2, "no"))
            for event in guest.receive(early[len(exec_frame) :]):
                assert isinstance(event, Event)
                guest.streams.reset(event.stream)
        carry(guest, host)
        check_remembered(host)
        check_remembered(guest)
    for link in (host, guest):
        left = [link.streams._open, link._subjects, link._commands, link._used]  # noqa: SLF001 - the bound is the promise
        assert not any(left)


@pytest.mark.parametrize("stream", [Stream.STDOUT, Stream.STDERR])
def test_a_command_does_not_end_before_its_output(stream: Stream) -> None:
    """EXITED before the end of the command's output is refused at both ends; afterwards it is accepted."""
    host, guest = pair_in(State.OPEN, CommandState.RUNNING)
    number = guest.open(stream, 1)
    stdin = host.open(Stream.STDIN, 1)
    carry(guest, host)
    carry(host, guest)
    with pytest.raises(ChannelUsageError, match="before the end of its output"):
        guest.send(EXITED)
    assert guest.pending() == 0
    assert guest.streams.is_open(stdin)
    hostile = link_in(HOST, State.OPEN, CommandState.RUNNING)
    list(hostile.receive(opening(1, stream, 1)))
    with pytest.raises(PeerError, match="before the end of its output"):
        list(hostile.receive(message(EXITED)))
    guest.streams.finish(number)
    guest.send(EXITED)
    assert same(carry(guest, host), [Event(streams.FIN, number, stream), EXITED])


def test_the_end_of_a_command_ends_its_input() -> None:
    """Once a command has ended, its input is closed at both ends, and later input is ignored or can be reset."""
    host, guest = pair_in(State.OPEN, CommandState.RUNNING)
    number = host.open(Stream.STDIN, 1)
    host.streams.send(number, b"early")
    carry(host, guest)
    host.streams.send(number, b"late")
    late = taken(host)
    guest.send(EXITED)
    carry(guest, host)
    assert host.streams.send(number, b"x") == 0
    assert list(guest.receive(late)) == []
    with pytest.raises(ChannelUsageError):
        host.open(Stream.STDIN, 1)


@pytest.mark.parametrize("last", [EXITED, Failed(0, "relay", 0, "ended"), CLOSED], ids=["EXITED", "FAILED", "CLOSED"])
def test_frames_crossing_the_end_are_accepted(last: Message) -> None:
    """STOP, input and files that cross the end of a command or session on the wire are accepted."""
    host, guest = pair_in(State.CLOSING, CommandState.RUNNING)
    number, file = host.open(Stream.STDIN, 1), host.open(Stream.INPUT, 0)
    carry(host, guest)
    guest.send(last)
    host.send(Stop(1, 9))
    host.streams.send(number, b"late")
    host.streams.finish(file)
    expected: list[Any] = [Stop(1, 9), Event(streams.DATA, number, Stream.STDIN, b"late")]
    if last is EXITED:  # with the command, its input is forgotten
        expected.pop()
    assert same(carry(host, guest), [*expected, Event(streams.FIN, file, Stream.INPUT)])
    assert same(carry(guest, host), [last])
    assert host.state is guest.state


# changes so far


def test_changes_so_far_are_sent_as_often_as_asked_for() -> None:
    """The guest sends the changes so far once for each CHANGES, one after the other, and again at the end."""
    host, guest = pair_in(State.OPEN, CommandState.RUNNING)
    with pytest.raises(ChannelUsageError):
        guest.open(Stream.CHANGES)
    for _ in range(1000):
        host.send(MESSAGES[Changes])
        host.send(MESSAGES[Changes])
        carry(host, guest)
        for _ in range(2):
            with pytest.raises(ChannelUsageError):
                guest.open(Stream.CHANGES, 1)
            number = guest.open(Stream.CHANGES)
            with pytest.raises(ChannelUsageError):  # one at a time, or not asked for
                guest.open(Stream.CHANGES)
            guest.streams.send(number, b"x")
            guest.streams.finish(number)
        assert len(carry(guest, host)) == 6
        check_remembered(host)
        check_remembered(guest)
    host.send(CLOSE_NOW)
    carry(host, guest)
    guest.streams.finish(guest.open(Stream.CHANGES))
    with pytest.raises(ChannelUsageError):
        guest.open(Stream.CHANGES)
    assert len(carry(guest, host)) == 2


def test_changes_that_were_not_asked_for_are_refused() -> None:
    """The host accepts one stream of changes for each CHANGES, and none with another subject."""
    for wire in (opening(1, Stream.CHANGES), opening(1, Stream.CHANGES) + frame(streams.FIN, 1)):
        host = link_in(HOST, State.OPEN, CommandState.RUNNING)
        host.send(MESSAGES[Changes])
        list(host.receive(wire))
        with pytest.raises(PeerError):
            list(host.receive(opening(3, Stream.CHANGES)))
    host = link_in(HOST, State.OPEN, CommandState.RUNNING)
    host.send(MESSAGES[Changes])
    with pytest.raises(PeerError):
        list(host.receive(opening(1, Stream.CHANGES, 1)))


# a new start


def test_everything_starts_anew_at_warm() -> None:
    """After CLOSED, WARM starts anew at both ends: streams, ids, files and windows."""
    host, guest = pair_in(State.OPEN, CommandState.RUNNING)
    for _ in range(3):
        assert host.streams.send(host.open(Stream.INPUT, 0), bytes(WINDOW + 1)) == WINDOW
        host.open(Stream.STDIN, 1)
        assert guest.streams.send(guest.open(Stream.STDOUT, 1), bytes(WINDOW + 1)) == WINDOW
        exchange(host, guest, CLOSE_NOW, CLOSED, MESSAGES[Warm])
        for link in (host, guest):
            left = [link.streams._open, link._subjects, link._commands, link._used]  # noqa: SLF001
            assert not any(left)
        exchange(host, guest, Warmed())
        assert host.state is guest.state is State.WARM
        exchange(host, guest, MESSAGES[Seed], Seeded(NONCE), OPEN, execute(1), Started(1))


def test_a_clone_starts_where_the_saved_machine_was() -> None:
    """A host that starts at WARM talks to a guest that was saved there, even after a program of the host's own."""
    first, guest = pair_in(State.OPEN, CommandState.ENDED)
    exchange(first, guest, CLOSE_NOW, CLOSED, MESSAGES[Warm], Warmed())
    host = Link(HOST, State.WARM)
    exchange(host, guest, MESSAGES[Seed], Seeded(NONCE), OPEN, execute(1))
    assert host.open(Stream.INPUT, 0) == 2
    assert len(carry(host, guest)) == 1
    exchange(host, guest, Started(1))
    assert guest.open(Stream.STDOUT, 1) == 1
    assert len(carry(guest, host)) == 1


# faults


@pytest.mark.parametrize(
    "wire",
    [
        message(Started(1)),
        message(EXITED),
        opening(1, Stream.OUTPUT),
        opening(1, Stream.STDOUT, 9),
        frame(streams.MESSAGE, 0, b"{}", FORMS[Failed].number),
        frame(99, 1),
    ],
)
def test_a_fault_is_final(wire: bytes) -> None:
    """After a fault of any kind a link raises PeerError for whatever it receives, and holds nothing."""
    host = link_in(HOST, State.OPEN, CommandState.STARTING if wire != message(Started(1)) else None)
    state = host.state
    with pytest.raises(PeerError):
        list(host.receive(wire + message(Failed(0, "x", 0, ""))))
    for later in (b"", message(Failed(0, "x", 0, "")), bytes(1 << 20)):
        with pytest.raises(PeerError):
            list(host.receive(later))
    assert host.state is state
    assert not host.streams._in  # noqa: SLF001 - the bound on it is the promise


def test_a_message_that_does_not_fit_changes_nothing() -> None:
    """A message that is too large is not sent, and the session stays where it was."""
    host = link_in(HOST, State.READY)
    with pytest.raises(ChannelUsageError):
        host.send(OPEN._replace(hostname="x" * (16 << 20)))
    assert (host.state, host.pending()) == (State.READY, 0)
    host.send(OPEN)


def test_a_reply_between_events_counts() -> None:
    """A reply sent between two events counts for the second one, even if both arrived together."""
    link = Link(HOST)
    seen = []
    for event in link.receive(message(MESSAGES[Hello]) + message(Seeded(NONCE))):
        seen.append(event)
        if isinstance(event, Hello):
            link.send(MESSAGES[Seed])
    assert same(seen, [MESSAGES[Hello], Seeded(NONCE)])
