"""A session that several threads use, with a guest that the test plays."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.guest.lies import EXITED
from tests.guest.messages import execute
from tests.guest.played import Pair
from x07_sandbox.channel.link import Stream
from x07_sandbox.channel.messages import Exec, Started, Stop
from x07_sandbox.sessions.command import Kept
from x07_sandbox.sessions.shared import SharedSession
from x07_sandbox.sessions.transfers import CommandStreams, Inbox

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.guest.played import FakeClock
    from x07_sandbox.sessions.execution import Execution


class Shared:
    """A shared session, its guest, and why it ended."""

    def __init__(self, pair: Pair, lifetime_s: float = 60, idle_s: float | None = None) -> None:
        self.pair = pair
        self.ended: list[str] = []
        self.session = SharedSession(pair.session, time.monotonic() + lifetime_s, idle_s, self.ended.append)
        self.session.begin()

    def start(self, number: int) -> tuple[Execution, Inbox]:
        """Start a command, and have the guest answer."""
        inbox = Inbox("stdout")
        given = CommandStreams(stdin_fd=None, stdout=inbox, stderr=Inbox("stderr"), open_input=True)
        with self.session.using() as session:
            command = session.execute(execute(number), given, None)
        self.pair.guest.until(Exec)
        self.pair.guest.say(Started(number))
        assert self.session.until(lambda: not command.starting, 30)
        return command, inbox


@pytest.fixture
def made(request: pytest.FixtureRequest) -> Iterator[Callable[..., Shared]]:
    """A function that makes a shared session."""
    with contextlib.ExitStack() as stack:
        clock: FakeClock = request.getfixturevalue("clock")

        def make(**life: float) -> Shared:
            shared = Shared(Pair(stack, clock), **life)
            stack.callback(shared.session.end)
            return shared

        yield make


@pytest.fixture
def clock() -> None:
    """The real clock: the loop runs in a thread of its own."""


def test_a_call_wakes_the_loop_and_waits_for_the_guest(made: Callable[..., Shared]) -> None:
    """A call from any thread reaches the guest at once, and its end wakes the caller."""
    shared = made()
    command, _ = shared.start(1)
    waiter = threading.Thread(target=shared.session.until, args=(lambda: command.ended, 30))
    waiter.start()
    with shared.session.using() as session:
        session.stop(command, signal.SIGTERM)
    assert shared.pair.guest.until(Stop) == Stop(1, signal.SIGTERM)
    shared.pair.guest.say(EXITED)
    waiter.join(60)
    assert command.ended
    assert shared.ended == []


def test_a_wait_ends_after_its_time(made: Callable[..., Shared]) -> None:
    """Waiting for what does not happen ends after the given time."""
    shared = made()
    began = time.monotonic()
    assert not shared.session.until(lambda: False, 0.1)
    assert 0.1 <= time.monotonic() - began < 30


def test_reading_nothing_does_not_wake_the_loop(made: Callable[..., Shared], monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that waits for data leaves the loop asleep."""
    shared = made()
    command, inbox = shared.start(1)
    turns: list[float] = []
    real = shared.pair.session.turn

    def turn(*args: Any, **words: Any) -> None:  # noqa: ANN401 - as it is called
        turns.append(time.monotonic())
        real(*args, **words)

    monkeypatch.setattr(shared.pair.session, "turn", turn)
    assert not shared.session.until(lambda: bool(shared.session.read(command)), 0.3)
    assert len(turns) < 5
    shared.pair.guest.stream(Stream.STDOUT, b"data", 1, ended=False)
    assert shared.session.until(lambda: inbox.waiting, 30)
    assert shared.session.read(command) == b"data"


@pytest.mark.parametrize(("life", "why"), [({"lifetime_s": 0.2}, "expired"), ({"idle_s": 0.2}, "idle")])
def test_a_session_ends_after_its_life(made: Callable[..., Shared], life: dict[str, float], why: str) -> None:
    """At the end of its lifetime or of its idle time, the loop ends and says why."""
    shared = made(**life)
    deadline = time.monotonic() + 30
    while shared.ended != [why]:
        assert time.monotonic() < deadline
        time.sleep(0.01)  # a call of `until` would not be idle
    assert (shared.session.over, shared.session.why) == (True, why)
    shared.session.wake()  # calls after the end are harmless
    shared.session.end()


def test_a_running_command_is_not_idle(made: Callable[..., Shared]) -> None:
    """A session with a command or a waiting call is not idle, nor at once after that, and extending moves its end."""
    shared = made(idle_s=2.0, lifetime_s=2.5)
    command, _ = shared.start(1)
    shared.session.extend(time.monotonic() + 60)
    time.sleep(3)  # nobody waits
    assert not shared.session.over
    shared.pair.guest.say(EXITED)
    assert shared.session.until(lambda: command.ended, 30)
    assert not shared.session.until(lambda: False, 2.5)  # a call that waits
    time.sleep(0.1)
    assert not shared.session.over
    deadline = time.monotonic() + 30
    while shared.ended != ["idle"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_lost_guest_wakes_all_callers(made: Callable[..., Shared]) -> None:
    """If the guest violates the protocol, every waiting call returns, and the session says that it was lost."""
    shared = made()
    command, _ = shared.start(1)
    found: list[bool] = []
    threads = [
        threading.Thread(target=lambda: found.append(shared.session.until(lambda: command.ended, 30))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    os.write(shared.pair.guest.connection.fd, b"\xff" * 64)
    for thread in threads:
        thread.join(60)
    assert (found, shared.session.why) == ([False] * 3, "lost")


@pytest.mark.parametrize(
    ("keep", "pieces", "wanted", "cut"),
    [
        ("head", [b"ab", b"cdef"], b"abcd", True),
        ("tail", [b"ab", b"cdef"], b"cdef", True),
        ("tail", [b"x" * 50, b"abcd"], b"abcd", True),
        ("both", [b"ab", b"cdef"], b"ab\n[... 2 bytes left out ...]\nef", True),
        ("both", [b"abcd"], b"abcd", False),
        ("head", [b"abcd"], b"abcd", False),
        ("tail", [], b"", False),
    ],
)
def test_what_is_kept_of_long_output(keep: str, pieces: list[bytes], wanted: bytes, cut: bool) -> None:  # noqa: FBT001
    """The head, the tail, or half of both is kept, and whether something is missing is known."""
    kept = Kept(4, keep)  # type: ignore[arg-type]
    for piece in pieces:
        kept.take(piece)
    assert (kept.data(), kept.truncated) == (wanted, cut)
