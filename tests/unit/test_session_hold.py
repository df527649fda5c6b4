"""Holding a session for a snapshot, with a guest that the test plays: quiet, floods, lies, silence and the end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from typing import TYPE_CHECKING, cast

import pytest

from tests.guest.lies import EXITED
from tests.guest.messages import NONCE, execute, message
from tests.guest.played import FakeClock, Guest, Machine, Pair
from x07_sandbox.backends.base import NoAnswerError, greet
from x07_sandbox.channel.link import DATA_MAX, Link, State, Stream
from x07_sandbox.channel.messages import FILES, Changes, Exec, Exited, Held, Hold, Resume, Seed, Seeded, Started, Stop
from x07_sandbox.errors import BackendError, UsageError
from x07_sandbox.files.incoming import Incoming
from x07_sandbox.host import settings
from x07_sandbox.host.waiting import Cancel
from x07_sandbox.sessions.session import Session
from x07_sandbox.sessions.snapshots import SavedCommand
from x07_sandbox.sessions.transfers import kept_streams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from x07_sandbox.backends.base import Instance


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    """What the test opens."""
    with contextlib.ExitStack() as opened:
        yield opened


@pytest.fixture
def pair(stack: contextlib.ExitStack) -> Pair:
    """An open session."""
    return Pair(stack, FakeClock())


@contextlib.contextmanager
def answering(work: Callable[[], object]) -> Iterator[None]:
    """Let a guest act in a thread."""
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join(60)
        assert not thread.is_alive()


def test_what_was_queued_arrives_before_the_programs_are_held(pair: Pair) -> None:
    """Output and ends that were under way are taken during the hold, and the guest gets no credit before RESUME."""
    pair.start(1), pair.start(2)

    def act() -> None:
        pair.guest.until(Hold)
        number = pair.guest.stream(Stream.STDOUT, bytes(DATA_MAX), 1, ended=False)
        pair.guest.say(EXITED._replace(id=2), Held(1, stopped=True))
        assert number
        held.wait(60)
        assert not pair.guest.events

    held = threading.Event()
    with answering(act):
        pair.session.hold()
        state, commands = pair.session.unended()
        held.set()
    assert (pair.session.held, [one.order.id for one in commands]) == (True, [1])
    assert ({*state.commands}, state.last_command, state.holds) == ({1}, 2, 1)
    pair.session.go_on()
    assert pair.guest.until(Resume) == Resume()
    pair.start(3)


@pytest.mark.parametrize("answer", [None, Held(1, stopped=False)])
def test_a_guest_that_does_not_hold_goes_on(pair: Pair, monkeypatch: pytest.MonkeyPatch, answer: Held | None) -> None:
    """A guest that is silent, or cannot stop its programs, costs a snapshot and not the session, also if it is late."""
    monkeypatch.setattr(settings, "HOLD_S", 0.2)
    command = pair.start(1)

    def act() -> None:
        pair.guest.until(Hold)
        if answer is not None:
            pair.guest.say(answer)

    with answering(act), pytest.raises(BackendError, match="did not stop in time"):
        pair.session.hold()
    pair.session.go_on()
    if answer is None:
        pair.guest.say(Held(1, stopped=True))
    pair.guest.until(Resume)
    pair.guest.say(EXITED)
    assert pair.session.until(lambda: command.ended)
    assert not pair.session.over


@pytest.mark.parametrize("forged", [Held(2, stopped=True), Seeded(NONCE), Exited(*EXITED._replace(id=9))])
def test_a_guest_that_lies_while_it_should_hold_is_lost(pair: Pair, forged: Held | Seeded | Exited) -> None:
    """An answer to another question, or about a command that does not exist, ends the session as usual."""
    pair.start(1)

    def act() -> None:
        pair.guest.until(Hold)
        os.write(pair.guest.connection.fd, message(forged))

    with answering(act), pytest.raises(BackendError):
        pair.session.hold()
    pair.session.go_on()
    assert pair.session.over
    assert pair.session.evidence().channel_error


def test_a_flood_cannot_prolong_a_hold(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that sends output for ever, and never HELD, is left when the time is up."""
    monkeypatch.setattr(settings, "HOLD_S", 0.3)
    pair.start(1)
    stop = threading.Event()

    def act() -> None:
        pair.guest.until(Hold)
        number = pair.guest.link.open(Stream.STDOUT, 1)
        with contextlib.suppress(OSError):
            while not stop.is_set():
                pair.guest.link.streams.send(number, bytes(1000))  # as far as its window
                pair.guest.connection.flush()

    with answering(act):
        try:
            with pytest.raises(BackendError, match="did not stop in time"):
                pair.session.hold()
        finally:
            stop.set()
    pair.session.go_on()
    assert not pair.session.over


def test_nothing_is_held_while_files_or_changes_travel(pair: Pair, stack: contextlib.ExitStack) -> None:
    """With a request for files unanswered, or changes asked for, no HOLD is sent."""
    server = pair.session.execute(execute(1)._replace(service=FILES), kept_streams(), None)
    server.write(b"x")
    with pytest.raises(UsageError, match="files are being copied"):
        pair.session.hold()
    server.unanswered = False
    data_fd = os.memfd_create("changes")
    stack.callback(os.close, data_fd)
    pair.session.changes(Incoming(data_fd, roots=1, most_entries=1, most_bytes=1))
    with pytest.raises(UsageError, match="files are being copied"):
        pair.session.hold()
    pair.turn()
    assert not [one for one in pair.guest.events if isinstance(one, Hold)]
    pair.guest.until(Changes)


def fork(stack: contextlib.ExitStack, pair: Pair) -> tuple[Machine, Guest, Link]:
    """Return the machine of a fork, its guest, and the host's link to it, from a session that is held."""
    state, _ = pair.session.unended()
    ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
    guest = Guest(theirs.fileno(), State.HELD)
    guest.connection.link = guest.link = pair.guest.link  # the copied memory
    return Machine(ours.fileno(), "fork", stack), guest, Link.resumed(state)


def hold(pair: Pair) -> None:
    """Hold the session."""
    with answering(lambda: pair.guest.say(Held(pair.guest.until(Hold).number, stopped=True))):
        pair.session.hold()


def test_a_fork_kills_what_was_to_be_killed_and_keeps_the_rest(stack: contextlib.ExitStack, pair: Pair) -> None:
    """In a fork, commands go on with their inputs; a file server, and a command that was being stopped, are killed."""
    plain, dying = pair.start(1, 60_000), pair.start(2)
    server = pair.session.execute(execute(3)._replace(service=FILES), kept_streams(), None)
    pair.turn()
    pair.guest.until(Exec)
    pair.guest.say(Started(3))
    assert pair.session.until(lambda: not server.starting)
    pair.session.stop(dying)
    hold(pair)
    saved = [SavedCommand.of(one) for one in pair.session.unended()[1]]
    machine, guest, link = fork(stack, pair)
    cancel = stack.enter_context(contextlib.closing(Cancel()))
    with answering(lambda: guest.say(Seeded(guest.until(Seed).nonce))):
        greet(cast("Instance", machine), link=link)
    assert machine.greeting is not None
    adopted = [one.execution() for one in saved]
    session = Session(cast("Instance", machine), cancel, None, (), None, adopted)
    session.until(lambda: False, 0.01)
    guest.until(Resume)
    assert {guest.until(Stop), guest.until(Stop)} == {Stop(2, signal.SIGKILL), Stop(3, signal.SIGKILL)}
    limit = adopted[0].limit
    assert limit is not None
    assert 0 < limit.left_s() <= 60
    assert adopted[0].order.detached
    assert plain.order.id == adopted[0].order.id
    number = guest.stream(Stream.STDOUT, b"said", 1)
    assert number
    assert session.until(lambda: bool(adopted[0].inbox("stdout").waiting))
    assert session.read(adopted[0]) == b"said"
    assert not session.until(lambda: session.over, 0.05)  # it waits for no files


def test_a_fork_whose_clock_is_late_gets_the_time_again(
    stack: contextlib.ExitStack, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the answer to SEED took long, SEED comes again with the same nonce, until an answer is quick."""
    hold(pair)
    machine, guest, link = fork(stack, pair)
    monkeypatch.setattr("x07_sandbox.backends.base._CLOCK_S", 0.2)
    seeds: list[Seed] = []

    def act() -> None:
        for wait_s in (0.3, 0.3, 0.0):
            seeds.append(guest.until(Seed))
            threading.Event().wait(wait_s)
            guest.say(Seeded(seeds[-1].nonce))

    with answering(act):
        greet(cast("Instance", machine), link=link)
    assert len({one.nonce for one in seeds}) == 1
    assert seeds[0].unix_ns < seeds[1].unix_ns < seeds[2].unix_ns
    assert link.state is State.HELD


@pytest.mark.parametrize("twice", [True, False])
def test_a_fork_that_answers_wrong_does_not_start(stack: contextlib.ExitStack, pair: Pair, *, twice: bool) -> None:
    """A fork that repeats another nonce, or answers twice at once, is refused."""
    hold(pair)
    machine, guest, link = fork(stack, pair)

    def act() -> None:
        nonce = guest.until(Seed).nonce
        guest.link.streams.message(5, nonce if twice else NONCE)
        if twice:
            guest.link.streams.message(5, nonce)
        guest.flush()

    why = "SEEDED while held" if twice else "nonce"
    with answering(act), pytest.raises(NoAnswerError, match=why):
        greet(cast("Instance", machine), link=link)


def test_the_session_before_a_rollback_ends_without_a_word(pair: Pair) -> None:
    """Commands begun after the moment have ended; older ones go on elsewhere; the guest is told nothing."""
    old, new = pair.start(1), pair.start(2)
    pair.guest.events.clear()
    pair.session.leave(1)
    assert (new.ended, new.rolled_back, old.ended, old.replaced) == (True, True, False, True)
    assert pair.session.over
    assert not pair.guest.events
