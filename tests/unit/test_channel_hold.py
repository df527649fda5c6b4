"""The channel while programs are held: a quiet moment for a snapshot, late and forged answers, and forks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.guest.lies import EXITED
from tests.guest.messages import (
    HOST,
    MESSAGES,
    NONCE,
    carry,
    exchange,
    execute,
    link_in,
    message,
    pair_in,
    same,
    taken,
)
from x07_sandbox.channel import streams
from x07_sandbox.channel.link import CommandState, Link, State, Stream
from x07_sandbox.channel.messages import Close, Held, Hold, Message, Resume, Seed, Seeded, Started, Stop
from x07_sandbox.channel.streams import Event, Role, Streams
from x07_sandbox.errors import ChannelUsageError, PeerError


def held(number: int = 1, *, stopped: bool = True) -> Held:
    """The answer to HOLD."""
    return Held(number, stopped)


def test_nothing_is_under_way_while_programs_are_held() -> None:
    """What the guest had to say comes before HELD, and neither side has anything queued after it."""
    host, guest = pair_in(State.OPEN, CommandState.RUNNING)
    output = guest.open(Stream.STDOUT, 1)
    guest.streams.send(output, b"before")
    exchange(host, guest, Hold(1))
    events = carry_after(guest, held(), host)
    assert [type(one) for one in events] == [Event, Event, Held]
    assert (host.state, guest.state, host.stopped) == (State.HELD, State.HELD, True)
    assert not host.pending()
    assert not guest.pending()
    exchange(host, guest, Resume())
    guest.streams.send(output, b"after")
    assert [one.data for one in carry(guest, host) if isinstance(one, Event)] == [b"after"]


def carry_after(sender: Link, last: Message, receiver: Link) -> list[Message | Event]:
    """Queue a message after what is queued, and deliver all."""
    sender.send(last)
    return carry(sender, receiver)


def test_a_host_that_gave_up_ignores_the_late_answer() -> None:
    """RESUME may come before HELD, and a late HELD changes nothing, also for the next HOLD."""
    host, guest = pair_in(State.OPEN, CommandState.RUNNING)
    host.send(Hold(1))
    host.send(Resume())
    got = guest.receive(taken(host))
    assert next(got) == Hold(1)
    guest.send(held())
    assert list(got) == [Resume()]
    assert guest.state is State.OPEN
    host.send(Hold(2))
    assert same(carry(guest, host), [held()])
    assert host.state is State.HOLDING  # the answer was to the first one
    carry(host, guest)
    exchange(host, guest, held(2, stopped=False))
    assert (host.state, host.stopped) == (State.HELD, False)


@pytest.mark.parametrize("wire", [held(0), held(2), held(2**32 - 1)])
def test_an_answer_to_no_question_is_a_fault(wire: Held) -> None:
    """HELD must answer a HOLD that was sent."""
    host = link_in(HOST, State.HOLDING, CommandState.RUNNING)
    with pytest.raises(PeerError):
        list(host.receive(message(wire)))


@pytest.mark.parametrize("state", [State.OPEN, State.HELD, State.CLOSING])
def test_a_second_answer_is_a_fault(state: State) -> None:
    """A guest may answer each HOLD once, however late."""
    host = link_in(HOST, State.HELD)
    if state is not State.HELD:
        host.send(Resume())
    if state is State.CLOSING:
        host.send(MESSAGES[Close])
    with pytest.raises(PeerError):
        list(host.receive(message(held())))


def test_only_one_hold_at_a_time() -> None:
    """HOLD has the next number, and comes while nothing is held."""
    host = link_in(HOST, State.OPEN)
    with pytest.raises(ChannelUsageError):
        host.send(Hold(2))
    host.send(Hold(1))
    for wrong in (Hold(2), execute(1)):
        with pytest.raises(ChannelUsageError):
            host.send(wrong)


def fork_of(host: Link, guest: Link) -> Link:
    """Return the host's end to a copy of a held VM that was seeded, whose guest end is *guest* itself."""
    fork = Link.resumed(host.held())
    exchange(fork, guest, MESSAGES[Seed], Seeded(NONCE))
    return fork


def test_a_fork_has_the_commands_but_no_streams() -> None:
    """In a fork, streams begin anew under the old ids of commands, and new commands have higher ids."""
    host, guest = pair_in(State.OPEN, CommandState.RUNNING)
    exchange(host, guest, execute(2), Started(2), EXITED._replace(id=2))
    host.open(Stream.STDIN, 1)
    guest.open(Stream.STDOUT, 1)
    carry(host, guest), carry(guest, host)
    exchange(host, guest, Hold(1), held())
    fork = fork_of(host, guest)
    exchange(fork, guest, MESSAGES[Seed], Seeded(NONCE))  # the first answer was late
    assert guest.state is fork.state is State.HELD
    exchange(fork, guest, Resume())
    assert (fork.open(Stream.STDIN, 1), guest.open(Stream.STDOUT, 1)) == (2, 1)
    carry(fork, guest), carry(guest, fork)
    with pytest.raises(ChannelUsageError):
        fork.send(execute(2))
    exchange(fork, guest, execute(3), Started(3), Hold(2), held(2), Resume())
    guest.streams.finish(1)
    carry(guest, fork)
    exchange(fork, guest, EXITED)
    assert host.state is State.HELD  # it is another VM's


@pytest.mark.parametrize("answers", [[Seeded(NONCE), Seeded(NONCE)], [Seeded(NONCE), Started(1)]])
def test_a_fork_says_nothing_but_seeded(answers: list[Message]) -> None:
    """A fork that answers SEED twice, or speaks before RESUME, is at fault."""
    host, guest = pair_in(State.OPEN, CommandState.STARTING)
    exchange(host, guest, Hold(1), held())
    fork = Link.resumed(host.held())
    fork.send(MESSAGES[Seed])
    with pytest.raises(PeerError):
        list(fork.receive(b"".join(map(message, answers))))


STEPS = st.lists(st.sampled_from(["hold", "give up", "command", "end", "output", "stop", "fork"]), max_size=40)


@given(STEPS)
def test_any_order_of_holds_and_forks_keeps_both_ends_alike(steps: list[str]) -> None:
    """Whatever is done between and during holds, both ends agree on the state, and what was sent arrives once."""
    host, guest = pair_in(State.OPEN)
    running: list[int] = []
    outputs: dict[int, int] = {}
    count = holds = 0
    for step in steps:
        if step in {"hold", "fork", "give up"}:
            holds += 1
            exchange(host, guest, Hold(holds))
            if step == "give up":
                host.send(Resume())
                assert carry_after(guest, held(holds), host)[-1] == held(holds)
                assert carry(host, guest) == [Resume()]
            else:
                exchange(host, guest, held(holds))
                if step == "fork":
                    host = fork_of(host, guest)
                    outputs.clear()
                exchange(host, guest, Resume())
        elif step == "command" and len(running) < 4:
            count += 1
            exchange(host, guest, execute(count), Started(count))
            running.append(count)
        elif step == "output" and running:
            number = running[-1]
            if number not in outputs:
                outputs[number] = guest.open(Stream.STDOUT, number)
            guest.streams.send(outputs[number], b"x%d" % number)
            data = [one.data for one in carry(guest, host) if isinstance(one, Event) and one.type == streams.DATA]
            assert data == [b"x%d" % number]
        elif step == "stop" and running:
            exchange(host, guest, Stop(running[0], 9))
        elif step == "end" and running:
            number = running.pop(0)
            guest.streams.finish(outputs.pop(number, 0))
            carry(guest, host)
            exchange(host, guest, EXITED._replace(id=number))
        assert host.state is guest.state is State.OPEN
        assert host._commands == guest._commands  # noqa: SLF001 - both ends must know the same


def test_bytes_before_all_frames() -> None:
    """What `preface` queues goes out first, and whole, also if it is written in parts."""
    sender = Streams(Role.GUEST, streams_table())
    sender.preface(NONCE)
    sender.message(1, b"\6\0\1x")
    assert taken(sender)[: len(NONCE)] == NONCE


def streams_table() -> streams.Table:
    """The table of the relay's stream."""
    from x07_sandbox.channel.egress import STREAMS

    return STREAMS
