"""A phase's deadlines: made for the guest, and not for whoever waits for it. The time here goes on when a test says."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from tests.fuzz.fuzz_channel import EXITED
from x07_sandbox.backends import handshake
from x07_sandbox.backends.base import NoAnswerError
from x07_sandbox.backends.handshake import Handshake, evidence_of, greet
from x07_sandbox.channel.connection import Connection
from x07_sandbox.channel.frames import DATA_MAX, PROTOCOL, WINDOW, Kind, Role, Stream
from x07_sandbox.channel.link import Control, Data, Eof, Event, State
from x07_sandbox.host import settings
from x07_sandbox.host.cancel import Cancel
from x07_sandbox.host.clocks import Deadline
from x07_sandbox.plan.outcomes import Stage
from x07_sandbox.runs import execute
from x07_sandbox.runs.execute import PhaseFacts
from x07_sandbox.runs.phase import PhaseSpec, PhaseStreams, run_phase
from x07_sandbox.runs.streams import InFile, Sink, memory_file

if TYPE_CHECKING:
    from x07_sandbox.backends.base import Instance, StartMode

pytestmark = pytest.mark.timeout(120)

WALL_S = 60.0


class Time:
    """What the deadlines are on: it stands still but when it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def after(self, seconds: float) -> Deadline:
        """As of `Deadline`."""
        return Deadline(self.now + seconds, clock=lambda: self.now)


class Machine:
    """What a phase asks of a machine that runs: its side of the channel, and streams beside it.

    Who writes to `side` has the phase look around; `stand_still` is what it does then.
    """

    def __init__(self, channel_fd: int, start_mode: StartMode, stack: contextlib.ExitStack) -> None:
        self.channel_fd = channel_fd
        self.start_mode = start_mode
        self.record = SimpleNamespace(job_id="1-2-3-run")
        self.pidfd = os.pidfd_open(os.getpid())
        self.side = os.eventfd(0)
        for fd in (self.pidfd, self.side):
            stack.callback(os.close, fd)
        self.stand_still: Callable[[], object] = lambda: None

    def release(self) -> None:
        """It runs."""

    def side_fds(self) -> tuple[int, ...]:
        """One."""
        return (self.side,)

    def drain(self, fd: int) -> None:
        """Take the word that there is something."""
        os.eventfd_read(fd)
        self.stand_still()

    def console_tail(self) -> str:
        """It has said nothing."""
        return ""

    def exit_status(self) -> None:
        """It lives."""


class Guest:
    """The other side: what the test says, and what has come."""

    def __init__(self, fd: int, state: State) -> None:
        self.connection = Connection(fd, Role.GUEST, state)
        self.events: list[Event] = []

    def say(self, kind: Kind, **body: object) -> None:
        """One control frame."""
        self.connection.link.send(kind, body)
        self.flush()

    def flush(self) -> None:
        """Until all that is queued is on its way."""
        poll = select.poll()
        poll.register(self.connection.fd, select.POLLOUT)
        while self.connection.link.pending():
            assert self.connection.flush()
            poll.poll(60_000)

    def next(self) -> Event:
        """What comes next."""
        poll = select.poll()
        poll.register(self.connection.fd, select.POLLIN)
        while not self.events:
            assert poll.poll(60_000), "nothing came"
            events = self.connection.read()
            assert events is not None, "the channel has ended"
            self.events += events
        return self.events.pop(0)

    def until(self, kind: Kind) -> dict[str, Any]:
        """Skip what comes up to that frame; its body."""
        while True:
            event = self.next()
            if isinstance(event, Control) and event.kind is kind:
                return event.body


class Run:
    """A phase in a thread, and both its sides."""

    def __init__(
        self, begun: StartMode, stack: contextlib.ExitStack, time: Time, files: tuple[bytes, ...] = ()
    ) -> None:
        self.time = time
        ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
        self.machine = Machine(ours.fileno(), begun, stack)
        self.guest = Guest(theirs.fileno(), State.WAITING if begun == "cold" else State.WARM)
        self.cancel = Cancel()
        stack.callback(self.cancel.close)
        self.stdout_fd = memory_file(b"", stack)
        sinks = [
            Sink(name, keep_fd=fd, live_fd=None, max_bytes=64 << 20)
            for name, fd in (("stdout", self.stdout_fd), ("stderr", memory_file(b"", stack)))
        ]
        spec = PhaseSpec(
            name="run",
            argv=["true"],
            env={},
            files=tuple(
                InFile(path=f"/x07/in/{number}", mode=0o644, kind="file", fd=memory_file(data, stack), size=len(data))
                for number, data in enumerate(files)
            ),
            limits={},
            wall_ms=int(WALL_S * 1000),
            ram_bytes=0,
        )
        streams = PhaseStreams(stdin_fd=None, stdout=sinks[0], stderr=sinks[1], cancel=self.cancel)
        threads = stack.enter_context(ThreadPoolExecutor(1))
        stack.callback(self.cancel)  # a test that has failed waits for nothing
        self.facts: Future[PhaseFacts] = threads.submit(self._carry_out, spec, streams)

    def _carry_out(self, spec: PhaseSpec, streams: PhaseStreams) -> PhaseFacts:
        instance = cast("Instance", self.machine)
        try:
            greet(instance, cancel_fd=self.cancel.fd)
        except NoAnswerError as exc:
            return PhaseFacts(evidence=evidence_of(exc.failure, self.cancel.signal))
        return run_phase(spec, instance, streams)

    def begin(self) -> None:
        """Up to START."""
        if self.machine.start_mode == "cold":
            self.guest.say(Kind.HELLO, protocol=PROTOCOL)
        self.guest.say(Kind.SEEDED, nonce=self.guest.until(Kind.SEED)["nonce"])
        self.guest.until(Kind.START)

    @contextlib.contextmanager
    def standing_still(self, seconds: float) -> Iterator[None]:
        """Meanwhile the phase does nothing, as a process that is stopped; so many seconds later it goes on."""
        stands, goes_on = threading.Event(), threading.Event()

        def stand() -> None:
            stands.set()
            goes_on.wait(60)

        self.machine.stand_still = stand
        self.look()
        assert stands.wait(60)
        self.machine.stand_still = lambda: None
        try:
            yield
        finally:
            self.time.now += seconds
            goes_on.set()

    def look(self) -> None:
        """Have the phase take a turn."""
        os.eventfd_write(self.machine.side, 1)

    def result(self) -> PhaseFacts:
        """What came of it."""
        return self.facts.result(60)


Runs = Callable[..., Run]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    """Phases of which the test is the guest, and the time."""
    clock = Time()
    monkeypatch.setattr(execute, "Deadline", clock)
    monkeypatch.setattr(handshake, "Deadline", clock)
    with contextlib.ExitStack() as stack:
        yield lambda begun="cold", files=(): Run(begun, stack, clock, files)


def test_files_may_take_long_as_long_as_they_are_taken(runs: Runs) -> None:
    """The time for copying in is that without progress: it limits no number of files."""
    data = os.urandom(8 * WINDOW)
    run = runs(files=(data,))
    run.begin()
    begun, came = run.time.now, b""
    while (event := run.guest.next()) != Eof(Stream.FIRST_FILE):
        if not isinstance(event, Data):
            continue
        came += event.payload
        run.guest.connection.link.consumed(event.stream, len(event.payload))
        if run.guest.connection.link.pending():  # a quarter of a window was taken
            run.guest.flush()
            if len(came) < 6 * WINDOW:  # so that there is more to send
                with run.standing_still(0.9 * settings.COPY_IN_S):
                    pass
    assert came == data
    assert run.time.now - begun > 10 * settings.COPY_IN_S
    run.guest.say(Kind.STARTED)
    run.guest.say(Kind.EXITED, **EXITED)
    assert run.result().evidence.wait_status == 0


def test_a_guest_that_takes_no_more_files_is_given_up(runs: Runs) -> None:
    """Without progress the time for copying in ends the phase."""
    run = runs(files=(bytes(2 * WINDOW),))
    run.begin()
    run.guest.next()
    run.time.now += settings.COPY_IN_S + 1
    run.look()
    evidence = run.result().evidence
    assert (evidence.stage, evidence.deadline_passed) == (Stage.SETUP, True)


def test_a_program_that_ended_while_we_stood_still_has_ended(runs: Runs) -> None:
    """A runner that is stopped beyond the deadline, and goes on, takes what has come meanwhile: output, and an end."""
    run = runs()
    run.begin()
    run.guest.say(Kind.STARTED)
    output = bytes(DATA_MAX)  # no more than the socket takes
    with run.standing_still(10 * WALL_S):
        run.guest.connection.link.send_data(Stream.STDOUT, output)
        run.guest.say(Kind.EXITED, **EXITED)
    facts = run.result()
    assert (facts.evidence.wait_status, facts.evidence.deadline_passed) == (0, False)
    assert os.fstat(run.stdout_fd).st_size == len(output)


def test_what_a_program_said_in_time_may_come_in_many_pieces(runs: Runs) -> None:
    """What was on its way while we stood still is taken however many reads it takes, as long as they take no time."""
    run = runs()
    run.begin()
    run.guest.say(Kind.STARTED)
    link = run.guest.connection.link
    with run.standing_still(10 * WALL_S):
        link.send_data(Stream.STDOUT, b".")
        run.guest.flush()
    for size in range(2, 22):
        link.send_data(Stream.STDOUT, b".")
        run.guest.flush()
        for _ in range(6000):
            if os.fstat(run.stdout_fd).st_size == size:
                break
            time.sleep(0.001)
    run.guest.say(Kind.EXITED, **EXITED)
    facts = run.result()
    assert (facts.evidence.wait_status, facts.evidence.deadline_passed) == (0, False)
    assert os.fstat(run.stdout_fd).st_size == 21


def test_a_program_that_runs_on_is_ended_although_we_stood_still(runs: Runs) -> None:
    """A runner that is stopped beyond the deadline, and goes on, ends a program that has not ended."""
    run = runs()
    run.begin()
    run.guest.say(Kind.STARTED)
    with run.standing_still(10 * WALL_S):
        pass
    run.guest.until(Kind.STOP)
    run.guest.say(Kind.EXITED, **(EXITED | {"wait_status": 9}))
    assert run.result().evidence.deadline_passed


def test_a_program_that_never_stops_writing_is_ended_at_its_deadline(runs: Runs) -> None:
    """There is always more to take from it: that does not put off its end."""
    run = runs()
    run.begin()
    run.guest.say(Kind.STARTED)
    passes_s = WALL_S  # once it has taken what comes first
    while True:
        run.guest.connection.link.send_data(Stream.STDOUT, bytes(WINDOW))
        run.guest.flush()
        if isinstance(event := run.guest.next(), Control):
            break
        run.time.now += passes_s
        passes_s = 0.05
    assert event.kind is Kind.STOP
    run.guest.say(Kind.EXITED, **EXITED)
    assert run.result().evidence.deadline_passed


@pytest.mark.parametrize("begun", ["cold", "clone"])
def test_a_machine_that_answered_while_we_stood_still_has_answered(runs: Runs, begun: StartMode) -> None:
    """A machine's answer counts although we come to read it after the time for it: no other is tried in its place."""
    run = runs(begun)
    nonce = run.guest.until(Kind.SEED)["nonce"] if begun == "clone" else None
    with run.standing_still(10 * settings.BOOT_S):
        if begun == "cold":
            run.guest.say(Kind.HELLO, protocol=PROTOCOL)
        else:
            run.guest.say(Kind.SEEDED, nonce=nonce)
    if begun == "cold":
        run.guest.say(Kind.SEEDED, nonce=run.guest.until(Kind.SEED)["nonce"])
    run.guest.until(Kind.START)
    run.guest.say(Kind.STARTED)
    run.guest.say(Kind.EXITED, **EXITED)
    facts = run.result()
    assert (facts.evidence.wait_status, facts.evidence.stage) == (0, Stage.COLLECT)


def test_a_machine_that_did_not_answer_in_time_is_given_up(runs: Runs) -> None:
    """Without an answer the time for booting ends the phase."""
    run = runs()
    with run.standing_still(settings.BOOT_S + 1):
        pass
    facts = run.result()
    assert (facts.evidence.boot_timeout, facts.evidence.stage) == (True, Stage.BOOT)


def test_an_agent_that_answered_in_time_is_heard_later() -> None:
    """Outside of a run, too, an answer counts that lay there when the time was up; none does not."""
    with contextlib.ExitStack() as stack:
        ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
        machine = cast("Instance", Machine(ours.fileno(), "cold", stack))
        failure = Handshake(machine, State.WAITING).until(State.GREETED, Deadline.after(0))
        assert failure is not None
        assert failure.why == "it did not answer in time"
        Guest(theirs.fileno(), State.WAITING).say(Kind.HELLO, protocol=PROTOCOL)
        assert Handshake(machine, State.WAITING).until(State.GREETED, Deadline.after(0)) is None
