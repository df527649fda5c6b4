"""Deadlines of a phase, on a clock that the test advances."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from tests.fuzz.fuzz_channel import EXITED
from x07_sandbox.backends import handshake
from x07_sandbox.backends.base import NoAnswerError
from x07_sandbox.backends.handshake import evidence_of, greet
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


class FakeClock:
    """A clock that only the test advances."""

    def __init__(self) -> None:
        self.now = 1000.0

    def after(self, seconds: float) -> Deadline:
        """Like `Deadline.after`."""
        return Deadline(self.now + seconds, clock=lambda: self.now)


class Machine:
    """A running VM as a phase sees it: its channel, and a stream beside it.

    A write to `side` wakes the phase, which then calls `on_drain`.
    """

    def __init__(self, channel_fd: int, start_mode: StartMode, stack: contextlib.ExitStack) -> None:
        self.channel_fd = channel_fd
        self.start_mode = start_mode
        self.record = SimpleNamespace(job_id="1-2-3-run")
        self.pidfd = os.pidfd_open(os.getpid())
        self.side = os.eventfd(0)
        for fd in (self.pidfd, self.side):
            stack.callback(os.close, fd)
        self.on_drain: Callable[[], object] = lambda: None

    def release(self) -> None:
        """Do nothing: it runs already."""

    def side_fds(self) -> tuple[int, ...]:
        """Return one descriptor."""
        return (self.side,)

    def drain(self, fd: int) -> None:
        """Consume the wake-up."""
        os.eventfd_read(fd)
        self.on_drain()

    def console_tail(self) -> str:
        """Return an empty console."""
        return ""

    def exit_status(self) -> None:
        """Return None: it is alive."""


class Guest:
    """The guest's side: frames from the test, and the events received."""

    def __init__(self, fd: int, state: State) -> None:
        self.connection = Connection(fd, Role.GUEST, state)
        self.events: list[Event] = []

    def say(self, kind: Kind, **body: object) -> None:
        """Send one control frame."""
        self.connection.link.send(kind, body)
        self.flush()

    def flush(self) -> None:
        """Send all queued bytes."""
        poll = select.poll()
        poll.register(self.connection.fd, select.POLLOUT)
        while self.connection.link.pending():
            assert self.connection.flush()
            poll.poll(60_000)

    def next(self) -> Event:
        """Wait for the next event."""
        poll = select.poll()
        poll.register(self.connection.fd, select.POLLIN)
        while not self.events:
            assert poll.poll(60_000), "nothing came"
            events = self.connection.read()
            assert events is not None, "the channel has ended"
            self.events += events
        return self.events.pop(0)

    def until(self, kind: Kind) -> dict[str, Any]:
        """Skip events up to that frame; return its body."""
        while True:
            event = self.next()
            if isinstance(event, Control) and event.kind is kind:
                return event.body


class Run:
    """A phase in a thread, and both ends of its channel."""

    def __init__(
        self, start_mode: StartMode, stack: contextlib.ExitStack, time: FakeClock, files: tuple[bytes, ...] = ()
    ) -> None:
        self.time = time
        ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
        self.machine = Machine(ours.fileno(), start_mode, stack)
        self.guest = Guest(theirs.fileno(), State.WAITING if start_mode == "cold" else State.WARM)
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
        """Go through the handshake up to START."""
        if self.machine.start_mode == "cold":
            self.guest.say(Kind.HELLO, protocol=PROTOCOL)
        self.guest.say(Kind.SEEDED, nonce=self.guest.until(Kind.SEED)["nonce"])
        self.guest.until(Kind.START)

    @contextlib.contextmanager
    def suspended(self, seconds: float) -> Iterator[None]:
        """Suspend the phase, as a stopped process, and resume it *seconds* later on the clock."""
        paused, resume = threading.Event(), threading.Event()

        def stand() -> None:
            paused.set()
            resume.wait(60)

        self.machine.on_drain = stand
        self.wake()
        assert paused.wait(60)
        self.machine.on_drain = lambda: None
        try:
            yield
        finally:
            self.time.now += seconds
            resume.set()

    def wake(self) -> None:
        """Wake the phase."""
        os.eventfd_write(self.machine.side, 1)

    def result(self) -> PhaseFacts:
        """Wait for the phase's facts."""
        return self.facts.result(60)


Runs = Callable[..., Run]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    """Phases whose guest and clock the test controls."""
    clock = FakeClock()
    monkeypatch.setattr(execute, "Deadline", clock)
    monkeypatch.setattr(handshake, "Deadline", clock)
    with contextlib.ExitStack() as stack:
        yield lambda start_mode="cold", files=(): Run(start_mode, stack, clock, files)


def test_copy_in_times_out_without_progress_only(runs: Runs) -> None:
    """The copy-in timeout applies to lack of progress, not to the total time."""
    data = os.urandom(8 * WINDOW)
    run = runs(files=(data,))
    run.begin()
    start, came = run.time.now, b""
    while (event := run.guest.next()) != Eof(Stream.FIRST_FILE):
        if not isinstance(event, Data):
            continue
        came += event.payload
        run.guest.connection.link.consumed(event.stream, len(event.payload))
        if run.guest.connection.link.pending():  # a quarter of a window was taken
            run.guest.flush()
            if len(came) < 6 * WINDOW:  # so that there is more to send
                with run.suspended(0.9 * settings.COPY_IN_S):
                    pass
    assert came == data
    assert run.time.now - start > 10 * settings.COPY_IN_S
    run.guest.say(Kind.STARTED)
    run.guest.say(Kind.EXITED, **EXITED)
    assert run.result().evidence.wait_status == 0


def test_a_guest_that_stops_accepting_files_is_killed(runs: Runs) -> None:
    """A guest that stops accepting files is killed after the copy-in timeout."""
    run = runs(files=(bytes(2 * WINDOW),))
    run.begin()
    run.guest.next()
    run.time.now += settings.COPY_IN_S + 1
    run.wake()
    evidence = run.result().evidence
    assert (evidence.stage, evidence.deadline_passed) == (Stage.SETUP, True)


def test_an_exit_during_suspension_counts(runs: Runs) -> None:
    """A runner that was suspended past the deadline still accepts the program's output and exit."""
    run = runs()
    run.begin()
    run.guest.say(Kind.STARTED)
    output = bytes(DATA_MAX)  # no more than the socket takes
    with run.suspended(10 * WALL_S):
        run.guest.connection.link.send_data(Stream.STDOUT, output)
        run.guest.say(Kind.EXITED, **EXITED)
    facts = run.result()
    assert (facts.evidence.wait_status, facts.evidence.deadline_passed) == (0, False)
    assert os.fstat(run.stdout_fd).st_size == len(output)


def test_a_program_running_after_suspension_is_ended(runs: Runs) -> None:
    """A runner that was suspended past the deadline ends a program that still runs."""
    run = runs()
    run.begin()
    run.guest.say(Kind.STARTED)
    with run.suspended(10 * WALL_S):
        pass
    run.guest.until(Kind.STOP)
    run.guest.say(Kind.EXITED, **(EXITED | {"wait_status": 9}))
    assert run.result().evidence.deadline_passed


def test_a_program_that_never_stops_writing_is_ended_at_its_deadline(runs: Runs) -> None:
    """A program that writes without pause is ended at its deadline."""
    run = runs()
    run.begin()
    run.guest.say(Kind.STARTED)
    passes_s = WALL_S  # after the first messages
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


@pytest.mark.parametrize("start_mode", ["cold", "clone"])
def test_an_answer_during_suspension_counts(runs: Runs, start_mode: StartMode) -> None:
    """A VM's answer that arrived while the runner was suspended counts as in time."""
    run = runs(start_mode)
    nonce = run.guest.until(Kind.SEED)["nonce"] if start_mode == "clone" else None
    with run.suspended(10 * settings.BOOT_S):
        if start_mode == "cold":
            run.guest.say(Kind.HELLO, protocol=PROTOCOL)
        else:
            run.guest.say(Kind.SEEDED, nonce=nonce)
    if start_mode == "cold":
        run.guest.say(Kind.SEEDED, nonce=run.guest.until(Kind.SEED)["nonce"])
    run.guest.until(Kind.START)
    run.guest.say(Kind.STARTED)
    run.guest.say(Kind.EXITED, **EXITED)
    facts = run.result()
    assert (facts.evidence.wait_status, facts.evidence.stage) == (0, Stage.COLLECT)


def test_a_vm_that_does_not_answer_times_out(runs: Runs) -> None:
    """A VM that does not answer within the boot timeout ends the phase."""
    run = runs()
    with run.suspended(settings.BOOT_S + 1):
        pass
    facts = run.result()
    assert (facts.evidence.boot_timeout, facts.evidence.stage) == (True, Stage.BOOT)
