"""A session with several commands, with a guest that the test plays."""

from __future__ import annotations

import contextlib
import errno
import signal
from typing import TYPE_CHECKING

import pytest

from tests.guest.lies import CLOSED, EXITED
from tests.guest.messages import execute
from tests.guest.played import CHANGES, FakeClock, Pair, Ticking
from x07_sandbox import sessions
from x07_sandbox.channel import streams
from x07_sandbox.channel.files import Answer, Request, encode
from x07_sandbox.channel.link import COMMANDS_MAX, WINDOW, Stream
from x07_sandbox.channel.messages import FILES, Changes, Close, Exec, Failed, Started, Stop
from x07_sandbox.errors import BackendError, PeerError, UsageError
from x07_sandbox.files.incoming import Incoming
from x07_sandbox.host import settings
from x07_sandbox.policy.outcomes import Stage
from x07_sandbox.sessions import execution
from x07_sandbox.sessions.files import FileServer
from x07_sandbox.sessions.transfers import CommandStreams, Inbox, InFile, Receivers, kept_streams, memory_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    from x07_sandbox.sessions.execution import Execution


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    """What the test opens."""
    with contextlib.ExitStack() as opened:
        yield opened


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """The clock of deadlines, which advances by a millisecond with each look at it, so that waiting ends."""
    ticking = Ticking()
    monkeypatch.setattr(execution, "Deadline", ticking)
    return ticking


@pytest.fixture
def pair(stack: contextlib.ExitStack, clock: FakeClock) -> Pair:
    """An open session without files."""
    return Pair(stack, clock)


def test_each_command_has_a_deadline_of_its_own(pair: Pair) -> None:
    """At its deadline a command is stopped, and other commands and the session go on."""
    late, other = pair.start(1, 1000), pair.start(2)
    pair.clock.now += 2
    pair.turn()
    assert pair.guest.until(Stop) == Stop(1, signal.SIGKILL)
    pair.guest.say(EXITED._replace(wait_status=9))
    assert pair.session.until(lambda: late.ended)
    assert pair.session.facts(late).evidence.deadline_passed
    facts = pair.session.facts(other)
    assert (facts.evidence.deadline_passed, facts.evidence.stage) == (False, Stage.RUN)
    assert (pair.session.over, other.ended) == (False, False)


def test_a_command_that_cannot_be_started_fails_alone(pair: Pair) -> None:
    """FAILED for a command ends that command, and the session goes on."""
    missing = pair.start(1, started=False)
    pair.guest.say(Failed(1, "exec", 2, "no such file"))
    assert pair.session.until(lambda: missing.ended)
    evidence = pair.session.facts(missing).evidence
    assert (evidence.stage, evidence.setup_failure, evidence.exec_errno) == (Stage.SETUP, "exec: no such file", 2)
    assert not pair.start(2).ended


def test_a_command_that_does_not_start_ends_alone(pair: Pair) -> None:
    """A command that does not start in time is stopped, and the session with its other commands goes on."""
    other, stuck = pair.start(1), pair.start(2, started=False)
    pair.clock.now += settings.COPY_IN_S + 1
    pair.turn()
    assert pair.guest.until(Stop) == Stop(2, signal.SIGKILL)
    pair.guest.say(Failed(2, "exec", 0, "it was stopped before its start"))
    assert pair.session.until(lambda: stuck.ended)
    assert pair.session.facts(stuck).evidence.deadline_passed
    assert (pair.session.over, other.ended, pair.start(3).starting) == (False, False, False)


def test_a_guest_that_does_not_stop_a_command_loses_the_session(pair: Pair) -> None:
    """If the guest does not end a command after STOP, the session ends."""
    command = pair.start(1)
    pair.session.stop(command)
    pair.clock.now += settings.SANDBOX_STOPPED_S + 1
    pair.turn()
    assert pair.session.over


def test_an_idle_session_has_no_deadline(stack: contextlib.ExitStack, clock: FakeClock) -> None:
    """Once its files have gone out, a session without commands waits for as long as it takes."""
    file = InFile(path="/x07/in/a", mode=0o644, kind="file", fd=memory_file(b"abc", stack), size=3)
    pair = Pair(stack, clock, (file,))
    assert pair.guest.until_event(streams.DATA).data == b"abc"
    clock.now += 2 * settings.COPY_IN_S
    pair.turn()
    assert not pair.session.over
    assert not pair.start(1).ended


def test_commands_at_once_are_limited(pair: Pair) -> None:
    """One command more than the guest accepts is refused before it is sent."""
    for number in range(1, COMMANDS_MAX + 1):
        pair.start(number)
    with pytest.raises(UsageError, match="cannot start the command"):
        pair.start(COMMANDS_MAX + 1)
    pair.guest.say(EXITED)
    pair.turn()
    assert not pair.start(COMMANDS_MAX + 1).ended


def test_changes_arrive_while_commands_run(stack: contextlib.ExitStack, pair: Pair) -> None:
    """The changes so far are sent when asked for, each time on a stream of their own."""
    pair.start(1)
    for _ in range(2):
        incoming = Incoming(memory_file(b"", stack), roots=1, most_entries=10, most_bytes=100)
        arrival = pair.session.changes(incoming)
        pair.turn()
        pair.guest.until(Changes)
        pair.guest.stream(Stream.CHANGES, CHANGES)
        assert pair.session.until(lambda arrival=arrival: arrival.ended)  # type: ignore[misc]
        assert incoming.complete


def test_closing_awaits_the_end_of_all_commands(pair: Pair) -> None:
    """CLOSED before the end of a command is a fault; after it, the session is closed."""
    command = pair.start(1)
    pair.session._link.send(Close(0, None, None))  # noqa: SLF001 - as `close`, which waits
    pair.turn()
    assert pair.guest.until(Close) == Close(0, None, None)
    pair.guest.say(EXITED._replace(wait_status=9), CLOSED)
    assert not pair.session.until(lambda: False)
    facts = pair.session.facts(command)
    assert (pair.session.over, facts.evidence.channel_error, facts.closed) == (True, None, CLOSED)
    assert pair.session.close(Receivers()) == CLOSED


def flooding(pair: Pair) -> tuple[Execution, int]:
    """Start a command whose output is kept in memory and fills its window; return the number of its stream."""
    given = CommandStreams(stdin_fd=None, stdout=Inbox("stdout"), stderr=Inbox("stderr"), open_input=True)
    command = pair.session.execute(execute(1), given, None)
    command.write(b"input")
    pair.turn()
    assert pair.guest.until_event(streams.DATA).data == b"input"
    pair.guest.say(Started(1))
    number = pair.guest.stream(Stream.STDOUT, bytes(30_000), 1, ended=False)
    for _ in range(9):  # a socket takes no more at once
        pair.turn()
        pair.guest.link.streams.send(number, bytes(30_000))
        pair.guest.flush()
    pair.turn()
    assert not pair.guest.events
    return command, number


def test_output_in_memory_holds_up_the_guest(pair: Pair) -> None:
    """Output that is kept in memory takes one window until it is read."""
    command, number = flooding(pair)
    assert len(pair.session.read(command)) == 300_000
    pair.turn()
    pair.guest.until_event(streams.CREDIT)
    assert pair.guest.link.streams.window(number) == WINDOW


def test_a_command_whose_output_nobody_reads_can_be_stopped(pair: Pair) -> None:
    """After a stop, further output is dropped and the guest may send it, so that the command can end."""
    command, number = flooding(pair)
    pair.session.stop(command)
    pair.turn()
    pair.guest.until_event(streams.CREDIT)
    assert pair.guest.link.streams.send(number, b"more") == len(b"more")
    pair.guest.link.streams.finish(number)
    pair.guest.say(EXITED._replace(wait_status=9))
    assert pair.session.until(lambda: command.ended, 5)
    assert (pair.session.read(command), pair.session.over) == (bytes(300_000), False)


def served(pair: Pair, number: int) -> FileServer:
    """A file server that was started."""
    return FileServer(pair.session, pair.session.execute(execute(number)._replace(service=FILES), kept_streams(), None))


def file_server(pair: Pair, output: bytes) -> FileServer:
    """Start a file server, whose answers are *output*."""
    files = served(pair, 1)
    pair.turn()
    pair.guest.until(Exec)
    pair.guest.say(Started(1))
    pair.guest.stream(Stream.STDOUT, output, 1)
    return files


def test_file_requests_are_answered(pair: Pair) -> None:
    """A request is sent with its content, and its answer and what follows come back."""
    files = file_server(pair, encode(Answer(0, 5)) + b"hello" + encode(Answer(2)))
    assert files.ask(Request("read", "/a", size=5)) == Answer(0, 5)
    assert files.content(5) == b"hello"
    assert files.ask(Request("write", "/b", size=3), [b"new"]) == Answer(2)
    pair.turn()
    sent = pair.guest.until_event(streams.DATA).data + pair.guest.until_event(streams.DATA).data
    assert sent == encode(Request("read", "/a", size=5)) + encode(Request("write", "/b", size=3)) + b"new"


def test_a_file_server_that_ends_is_reported(pair: Pair) -> None:
    """If the file server ends, requests raise an error and do not wait."""
    files = file_server(pair, b"")
    pair.guest.say(EXITED)
    with pytest.raises(BackendError, match="cannot reach the files"):
        files.ask(Request("read", "/a"))
    with pytest.raises(OSError, match="could not be read to its end"):
        files.piece(1)


def test_a_file_server_without_progress_does_not_hold_its_caller(pair: Pair) -> None:
    """A request that is not answered, or whose content is not taken, raises TimeoutError, and the server is killed."""
    files = served(pair, 1)
    with pytest.raises(TimeoutError, match=r"made no progress for 0.05 s: '/a'") as raised:
        files.ask(Request("list", "/a"), (), 0.05)
    assert raised.value.errno == errno.ETIMEDOUT
    files.kill()
    pair.turn()
    assert (pair.guest.until(Stop), pair.session.over) == (Stop(1, signal.SIGKILL), False)
    with pytest.raises(TimeoutError):
        served(pair, 2).ask(Request("write", "/a"), [bytes(WINDOW)] * 4, 0.05)


def test_single_bytes_are_no_progress_of_a_file_request(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file server that sends single bytes reaches the time limit, and one that sends much does not."""
    still = FakeClock()
    monkeypatch.setattr(sessions.files, "Deadline", still)
    files = served(pair, 1)
    pair.turn()
    pair.guest.until(Exec)
    pair.guest.say(Started(1))
    number = pair.guest.stream(Stream.STDOUT, encode(Answer(0, 1 << 20)), 1, ended=False)
    assert files.ask(Request("read", "/a"), (), 60).size == 1 << 20
    for size, later_s in (*[(32_768, 25)] * 6, (1, 17), (1, 17.95)):
        pair.guest.link.streams.send(number, bytes(size))
        pair.guest.flush()
        assert files.content(size) == bytes(size)
        still.now += later_s
    with pytest.raises(TimeoutError):
        files.piece(1)


def test_a_caller_that_was_stopped_itself_waits_anew(
    pair: Pair, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the calling process was stopped (Ctrl-Z) past the time limit, the file server still has time to answer."""
    monkeypatch.setattr(sessions.files, "Deadline", clock)
    files = file_server(pair, encode(Answer(0, 5)) + b"hello")
    turn = pair.session.turn

    def stopped_once(_within_s: float) -> None:
        monkeypatch.setattr(pair.session, "turn", turn)
        clock.now += 600

    monkeypatch.setattr(pair.session, "turn", stopped_once)
    assert files.ask(Request("read", "/a", size=5)) == Answer(0, 5)


def test_a_bad_answer_about_files_is_rejected(pair: Pair) -> None:
    """An answer that the file server could not have given raises PeerError."""
    with pytest.raises(PeerError):
        file_server(pair, b"\xff" * 100).ask(Request("read", "/a"))


def test_what_happens_later_is_not_blamed_on_a_command_that_has_ended(pair: Pair) -> None:
    """The evidence about a command that has ended stays as it was when the session is lost later."""
    ended, running = pair.start(1, 1000), pair.start(2)
    pair.guest.say(EXITED)
    assert pair.session.until(lambda: ended.ended)
    pair.start(3, started=False)
    for late_s in (settings.COPY_IN_S, settings.SANDBOX_STOPPED_S):
        pair.clock.now += late_s + 1
        pair.turn()
    assert pair.session.over
    assert not pair.session.facts(ended).evidence.deadline_passed
    evidence = pair.session.facts(running).evidence
    assert (evidence.stage, evidence.deadline_passed) == (Stage.RUN, False)


def test_single_bytes_are_no_progress_of_a_copy(stack: contextlib.ExitStack, clock: FakeClock) -> None:
    """A guest that takes a file in single bytes reaches the deadline for copying in."""
    size = 2 * WINDOW
    file = InFile(path="/x07/in/a", mode=0o644, kind="file", fd=memory_file(bytes(size), stack), size=size)
    pair = Pair(stack, clock, (file,))
    number = pair.guest.until_event(streams.DATA).stream
    for _ in range(5):
        clock.now += settings.COPY_IN_S / 2
        pair.guest.link.streams._queue_first(streams.CREDIT, number, (1).to_bytes(4, "big"))  # noqa: SLF001 - hostile
        pair.guest.flush()
        pair.turn()
    assert pair.session.over
