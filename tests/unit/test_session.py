"""A session with a guest that the test plays: deadlines, on a clock that the test advances, and bad guests."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

import pytest
from msgspec.structs import replace

from tests.guest import lies
from tests.guest.lies import CLOSED, EXITED
from tests.guest.messages import PLAIN, execute
from tests.guest.played import CHANGES, FakeClock, Guest, Machine
from x07_sandbox.backends import base
from x07_sandbox.backends.base import NoAnswerError, evidence_of, greet
from x07_sandbox.channel import streams
from x07_sandbox.channel.link import DATA_MAX, WINDOW, State, Stream
from x07_sandbox.channel.messages import (
    PROTOCOL,
    Close,
    Exec,
    Failed,
    Hello,
    Left,
    Open,
    Seed,
    Seeded,
    Started,
    Stop,
    encode,
)
from x07_sandbox.channel.streams import Event
from x07_sandbox.channel.trees import Entry, Kind
from x07_sandbox.files.incoming import Incoming
from x07_sandbox.host import settings, waiting
from x07_sandbox.host.waiting import Cancel
from x07_sandbox.policy.outcomes import Stage, classify
from x07_sandbox.sessions import execution
from x07_sandbox.sessions.execution import Facts
from x07_sandbox.sessions.private_files import LeftFiles
from x07_sandbox.sessions.session import Session
from x07_sandbox.sessions.specs import input_files
from x07_sandbox.sessions.transfers import CommandStreams, InFile, OutFile, Receivers, Sink, memory_file

if TYPE_CHECKING:
    from x07_sandbox.backends.base import Instance, StartMode


WALL_S = 60.0
SILENT = CommandStreams(stdin_fd=None, stdout=cast("Sink", None), stderr=cast("Sink", None))


class Run:
    """A phase in a thread, and both ends of its channel."""

    def __init__(
        self,
        start_mode: StartMode,
        stack: contextlib.ExitStack,
        time: FakeClock,
        files: tuple[bytes, ...] = (),
        receivers: Receivers | None = None,
        stdin_fd: int | None = None,
    ) -> None:
        self.time = time
        self.stdin = 0  # the number of the input's stream
        ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
        self.channel = ours
        self.machine = Machine(ours.fileno(), start_mode, stack)
        self.guest = Guest(theirs.fileno(), State.WAITING if start_mode == "cold" else State.WARM)
        self.cancel = Cancel()
        stack.callback(self.cancel.close)
        self.stdout_fd = memory_file(b"", stack)
        sinks = [
            Sink(name, keep_fd=fd, live_fd=None, max_bytes=64 << 20)
            for name, fd in (("stdout", self.stdout_fd), ("stderr", memory_file(b"", stack)))
        ]
        receivers = receivers or Receivers()
        ins = tuple(
            InFile(path=f"/x07/in/{number}", mode=0o644, kind="file", fd=memory_file(data, stack), size=len(data))
            for number, data in enumerate(files)
        )
        opening = PLAIN._replace(files=input_files(ins), out_writable=receivers.output is not None)
        if receivers.left is not None:
            receivers = replace(receivers, left_wanted=Left(1, 1 << 20))
        given = CommandStreams(stdin_fd=stdin_fd, stdout=sinks[0], stderr=sinks[1])
        threads = stack.enter_context(ThreadPoolExecutor(1))
        stack.callback(self.cancel)  # a test that has failed waits for nothing
        self.facts: Future[Facts] = threads.submit(self._carry_out, opening, ins, given, receivers)

    def _carry_out(
        self, opening: Open, files: tuple[InFile, ...], given: CommandStreams, receivers: Receivers
    ) -> Facts:
        instance = cast("Instance", self.machine)
        try:
            greet(instance, cancel_fd=self.cancel.fd)
        except NoAnswerError as exc:
            return Facts(evidence=evidence_of(exc.failure, self.cancel.signal))
        session = Session(instance, self.cancel, opening, files)
        return session.run(execute(1), given, int(WALL_S * 1000), receivers)

    def begin(self, *, started: bool = False) -> None:
        """Go through the handshake up to CLOSE, which the host sends right after EXEC. started: answer STARTED."""
        if self.machine.start_mode == "cold":
            self.guest.say(Hello(PROTOCOL))
        self.guest.say(Seeded(self.guest.until(Seed).nonce))
        self.guest.until(Exec)
        self.stdin = self.guest.until_event(streams.OPEN).stream
        self.guest.until(Close)
        if started:
            self.guest.say(Started(1))

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

    def result(self) -> Facts:
        """Wait for the phase's facts."""
        return self.facts.result(60)


Runs = Callable[..., Run]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    """Phases whose guest and clock the test controls. started: their program has started."""
    clock = FakeClock()
    monkeypatch.setattr(execution, "Deadline", clock)
    monkeypatch.setattr(base, "Deadline", clock)
    monkeypatch.setattr(waiting, "Deadline", clock)
    with contextlib.ExitStack() as stack:

        def make(start_mode: StartMode = "cold", *, started: bool = False, **given: Any) -> Run:  # noqa: ANN401 - for Run
            run = Run(start_mode, stack, clock, **given)
            if started:
                run.begin(started=True)
            return run

        yield make


def test_copy_in_times_out_without_progress_only(runs: Runs) -> None:
    """The copy-in timeout applies to lack of progress, not to the total time."""
    data = os.urandom(8 * WINDOW)
    run = runs(files=(data,))
    run.begin()
    start, came = run.time.now, b""
    while (event := run.guest.until(Event)).type != streams.FIN or event.code != Stream.INPUT:
        if event.type != streams.DATA:
            continue
        came += event.data
        run.guest.link.streams.consumed(event.stream, len(event.data))
        if run.guest.link.pending():  # a quarter of a window was taken
            run.guest.flush()
            if len(came) < 6 * WINDOW:  # so that there is more to send
                with run.suspended(0.9 * settings.COPY_IN_S):
                    pass
    assert came == data
    assert run.time.now - start > 10 * settings.COPY_IN_S
    run.guest.say(Started(1), EXITED, CLOSED)
    assert run.result().evidence.wait_status == 0


def test_a_command_whose_start_is_read_late_started_before(runs: Runs) -> None:
    """The time from start to exit is as the guest measured it, within what the host has seen, if both are read late."""
    late = execution.Execution(execute(1), SILENT, None, 100.0)
    late.times_ms["started"] = 500.0
    late.ran(500.2, 122.1)
    assert late.times_ms == {"started": 378.1, "exited": 500.2}
    late.ran(500.2, 0.1)
    assert late.times_ms == {"started": 378.1, "exited": 500.2}
    late.ran(500.2, 1e12)
    assert late.times_ms == {"started": 100.0, "exited": 500.2}
    run = runs()
    run.begin()
    with run.suspended(1):
        run.guest.say(Started(1), EXITED._replace(wall_us=2**62), CLOSED)
    times = run.result().times_ms
    assert times["seeded"] <= times["started"] <= times["exited"]


def test_a_guest_that_stops_accepting_files_is_killed(runs: Runs) -> None:
    """A guest that stops accepting files is killed after the copy-in timeout."""
    run = runs(files=(bytes(2 * WINDOW),))
    run.begin()
    run.guest.until_event(streams.DATA)
    run.time.now += settings.COPY_IN_S + 1
    run.wake()
    evidence = run.result().evidence
    assert (evidence.stage, evidence.deadline_passed) == (Stage.SETUP, True)


def test_a_guest_that_never_closes_the_session_is_killed(runs: Runs) -> None:
    """After the program's end, a guest that does not finish sending is killed after a timeout of its own."""
    run = runs(started=True)
    run.guest.say(EXITED)
    with run.suspended(settings.CHANGES_OUT_S + 1):
        pass
    evidence = run.result().evidence
    assert (evidence.stage, evidence.deadline_passed, evidence.wait_status) == (Stage.COLLECT, True, 0)


def test_an_exit_during_suspension_counts(runs: Runs) -> None:
    """A runner that was suspended past the deadline still accepts the program's output and exit."""
    run = runs(started=True)
    output = bytes(32 * 1024)  # no more than the socket takes on any host
    with run.suspended(10 * WALL_S):
        run.guest.stream(Stream.STDOUT, output, 1)
        run.guest.say(EXITED, CLOSED)
    facts = run.result()
    assert (facts.evidence.wait_status, facts.evidence.deadline_passed) == (0, False)
    assert os.fstat(run.stdout_fd).st_size == len(output)


def test_a_program_running_after_suspension_is_ended(runs: Runs) -> None:
    """A runner that was suspended past the deadline ends a program that still runs."""
    run = runs(started=True)
    with run.suspended(10 * WALL_S):
        pass
    assert run.guest.until(Stop) == Stop(1, signal.SIGKILL)
    run.guest.say(EXITED._replace(wait_status=9), CLOSED)
    assert run.result().evidence.deadline_passed


def test_a_program_that_never_stops_writing_is_ended_at_its_deadline(runs: Runs) -> None:
    """A program that writes without pause is ended at its deadline."""
    run = runs(started=True)
    number = run.guest.stream(Stream.STDOUT, b"", 1, ended=False)
    passes_s = WALL_S  # after the first messages
    while True:
        run.guest.link.streams.send(number, bytes(WINDOW))
        run.guest.flush()
        if not isinstance(event := run.guest.next(), Event):
            break
        run.time.now += passes_s
        passes_s = 0.05
    assert event == Stop(1, signal.SIGKILL)
    run.guest.link.streams.finish(number)
    run.guest.say(EXITED, CLOSED)
    assert run.result().evidence.deadline_passed


@pytest.mark.parametrize("start_mode", ["cold", "clone"])
def test_an_answer_during_suspension_counts(runs: Runs, start_mode: StartMode) -> None:
    """A VM's answer that arrived while the runner was suspended counts as in time."""
    run = runs(start_mode)
    nonce = run.guest.until(Seed).nonce if start_mode == "clone" else b""
    with run.suspended(10 * settings.BOOT_S):
        run.guest.say(Hello(PROTOCOL) if start_mode == "cold" else Seeded(nonce))
    if start_mode == "cold":
        run.guest.say(Seeded(run.guest.until(Seed).nonce))
    run.guest.until(Exec)
    run.guest.say(Started(1), EXITED, CLOSED)
    facts = run.result()
    assert (facts.evidence.wait_status, facts.evidence.stage) == (0, Stage.COLLECT)


def test_a_vm_that_does_not_answer_times_out(runs: Runs) -> None:
    """A VM that does not answer within the boot timeout ends the phase."""
    run = runs()
    with run.suspended(settings.BOOT_S + 1):
        pass
    facts = run.result()
    assert (facts.evidence.boot_timeout, facts.evidence.stage) == (True, Stage.BOOT)


@pytest.fixture
def receivers() -> Iterator[Receivers]:
    """Receivers of an output file of at most ten bytes, and of changes of at most one entry."""
    with contextlib.ExitStack() as stack:
        yield Receivers(
            output=OutFile(path="/x07/out/program", fd=memory_file(b"", stack), max_bytes=10),
            changes=Incoming(memory_file(b"", stack), roots=1, most_entries=1, most_bytes=100),
        )


def output_of(receivers: Receivers) -> tuple[bytes, bool]:
    """Return the content that came of the output file, and whether it counts as complete."""
    assert receivers.output is not None
    return os.pread(receivers.output.fd, 100, 0), receivers.output.complete


def test_output_and_changes_arrive_before_the_session_closes(runs: Runs, receivers: Receivers) -> None:
    """The output file is complete once CLOSED confirms its size."""
    run = runs(receivers=receivers, started=True)
    run.guest.say(EXITED)
    run.guest.stream(Stream.OUTPUT, b"built")
    run.guest.stream(Stream.CHANGES, Entry(Kind.ROOT, b"0").encoded() + Entry(Kind.END, b"").encoded())
    closed = CLOSED._replace(output_bytes=5)
    run.guest.say(closed)
    facts = run.result()
    assert (facts.evidence.wait_status, facts.evidence.stage, facts.closed) == (0, Stage.COLLECT, closed)
    assert receivers.changes.complete
    assert output_of(receivers) == (b"built", True)


@pytest.mark.parametrize(
    ("sent", "stated", "error"),
    [
        (b"built", None, None),
        (b"built", 4, None),
        (b"built", 6, None),
        (bytes(11), 11, "bad frame: the output file is larger than was asked for"),
    ],
)
def test_an_output_file_of_another_size_is_incomplete(
    runs: Runs, receivers: Receivers, sent: bytes, stated: int | None, error: str | None
) -> None:
    """An output file whose size is not the one that CLOSED states is not used, and a larger one ends the session."""
    run = runs(receivers=receivers, started=True)
    run.guest.say(EXITED)
    run.guest.stream(Stream.OUTPUT, sent)
    run.guest.say(CLOSED._replace(output_bytes=stated))
    assert run.result().evidence.channel_error == error
    assert output_of(receivers) == (b"" if error else sent, False)


@pytest.mark.parametrize(
    ("stream", "asked"),
    [
        *((stream, False) for stream in (Stream.OUTPUT, Stream.CHANGES, Stream.LEFT, Stream.RELAY)),
        *((stream, True) for stream in (Stream.OUTPUT, Stream.CHANGES)),
    ],
)
def test_what_was_not_asked_for_or_comes_too_early_ends_the_session(
    runs: Runs,
    receivers: Receivers,
    stream: Stream,
    asked: bool,  # noqa: FBT001 - as parametrize gives it
) -> None:
    """The guest can send nothing that the host has not asked for, and no output while the program still runs."""
    run = runs(receivers=receivers if asked else None, started=True)
    if not asked:
        run.guest.say(EXITED)
    run.guest.link.open(stream)
    run.guest.flush()
    assert run.result().evidence.channel_error == f"bad frame: {stream.name} was not asked for"


@pytest.mark.parametrize("more", [False, True])
def test_changes_over_a_limit_are_refused(runs: Runs, receivers: Receivers, more: bool) -> None:  # noqa: FBT001
    """If the host takes no more changes, the session ends, unless files of private folders are to come."""
    if more:
        receivers = replace(receivers, left=LeftFiles(contextlib.ExitStack(), 100))
    run = runs(receivers=receivers, started=True)
    run.guest.say(EXITED)
    number = run.guest.stream(Stream.CHANGES, CHANGES + bytes(DATA_MAX), ended=False)
    if more:
        assert run.guest.until_event(streams.RESET).stream == number
        assert not run.guest.link.streams.is_open(number)
        run.guest.say(CLOSED)
    facts = run.result()
    closed = CLOSED if more else None
    assert (facts.evidence.channel_error, facts.evidence.wait_status, facts.closed) == (None, 0, closed)
    assert receivers.changes.too_many
    assert not receivers.changes.complete


@pytest.mark.parametrize("stream", [Stream.STDOUT, Stream.CHANGES])
def test_a_stream_may_be_aborted_by_the_guest(runs: Runs, receivers: Receivers, stream: Stream) -> None:
    """If the guest aborts a stream, the host keeps what came, and the rest of the session goes on."""
    run = runs(receivers=receivers, started=True)
    if stream is Stream.CHANGES:
        run.guest.say(EXITED)
        run.guest.link.streams.reset(run.guest.stream(stream, b"", ended=False))
    else:
        run.guest.link.streams.reset(run.guest.stream(stream, b"out", 1, ended=False))
        run.guest.say(EXITED)
    run.guest.say(CLOSED)
    facts = run.result()
    assert (facts.evidence.channel_error, facts.evidence.wait_status) == (None, 0)
    assert os.pread(run.stdout_fd, 10, 0) == (b"out" if stream is Stream.STDOUT else b"")
    assert not receivers.changes.complete


def test_input_that_the_guest_wants_no_more_is_not_read(runs: Runs) -> None:
    """If the guest aborts the stream of the input, the host reads no more of the input."""
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb", buffering=0) as given, os.fdopen(writer, "wb", buffering=0) as source:
        source.write(b"one")
        run = runs(stdin_fd=reader)
        run.begin(started=True)
        assert run.guest.until_event(streams.DATA).data == b"one"
        run.guest.link.streams.reset(run.stdin)
        run.guest.flush()
        with run.suspended(0):
            source.write(b"two")
        run.guest.say(EXITED, CLOSED)
        facts = run.result()
        assert (facts.evidence.channel_error, facts.evidence.wait_status, facts.input_sha256) == (None, 0, None)
        assert given.read(10) == b"two"


def test_two_ends_of_one_program_end_the_session(runs: Runs) -> None:
    """A second EXITED for the same program is an error, and the first report stays."""
    run = runs(started=True)
    run.guest.say(EXITED)
    run.guest.link.streams.message(*encode(EXITED._replace(wait_status=9)))
    run.guest.flush()
    facts = run.result()
    assert facts.evidence.channel_error == "message out of order: EXITED for command 1"
    assert (facts.evidence.wait_status, facts.exited) == (0, EXITED)


def test_a_failed_start_names_its_errno(runs: Runs) -> None:
    """FAILED for the command carries the errno of execve(2), and FAILED for the session does not."""
    found = []
    for command in (1, 0):
        run = runs()
        run.begin()
        run.guest.say(Failed(command, "exec" if command else "mount", 2, "no such file"))
        evidence = run.result().evidence
        found.append((evidence.stage, evidence.setup_failure, evidence.exec_errno))
    assert found == [(Stage.SETUP, "exec: no such file", 2), (Stage.SETUP, "mount: no such file", 0)]


# lies


class Liar(lies.Lies):
    """A guest that lies."""

    def __init__(self, run: Run) -> None:
        self.connection = run.guest.connection
        self.link = run.guest.link
        self.of_host = [run.stdin]


def told(run: Run, lie: str) -> Facts:
    """Return the facts of a run whose guest tells a lie, maybe for ever."""
    with ThreadPoolExecutor(1) as threads:
        telling = threads.submit({**lies.DEEDS, **lies.UNSTARTED}[lie], Liar(run))
        try:
            return run.result()
        finally:
            run.channel.shutdown(socket.SHUT_RDWR)
            with contextlib.suppress(OSError):
                telling.result(60)


# A lie for each kind of error; all of them are in tests of the streams, the link, and the messages.
LOST = [
    ("garbage", "violated the channel protocol while running the program"),
    ("status", "an invalid wait status: 4991"),
    ("failed", "the guest failed while running the program: x: ?[2J it broke"),
    ("unstarted", "message out of order: FAILED for command 1"),
    ("json", "violated the channel protocol while running the program: bad DENIED message: invalid JSON"),
    ("changes", "bad frame: CHANGES was not asked for"),
]


@pytest.mark.parametrize(("lie", "reason"), LOST, ids=[lie for lie, _ in LOST])
def test_each_way_to_lose_a_guest_has_its_own_reason(runs: Runs, lie: str, reason: str) -> None:
    """A lie of the guest while the program runs is `guest-lost`, fault program, with a specific short reason."""
    run = runs(started=True)
    found = classify(told(run, lie).evidence)
    assert (found.outcome, found.fault) == ("guest-lost", "program")
    assert reason in found.reason
    assert (found.reason.isprintable(), found.reason.isascii(), len(found.reason) < 400) == (True, True, True)


@pytest.mark.parametrize(
    ("lie", "reason"),
    [("early", "bad frame: STDOUT 1 cannot be opened"), ("early-exit", "message out of order: EXITED for command 1")],
)
def test_a_program_that_was_not_started_says_and_ends_nothing(runs: Runs, lie: str, reason: str) -> None:
    """Output or an end before the program was started is `guest-lost`, fault host."""
    run = runs()
    run.begin()
    facts = told(run, lie)
    found = classify(facts.evidence)
    assert (found.outcome, found.fault, reason in found.reason) == ("guest-lost", "host", True), found.reason
    assert facts.evidence.stage is Stage.SETUP


@pytest.mark.parametrize(("lie", "stdout"), [("closed", b""), ("more", b"all"), ("abort", b"out")])
def test_frames_that_change_nothing_are_ignored(runs: Runs, lie: str, stdout: bytes) -> None:
    """A second CLOSED, data on a stream that has ended, and the end of every stream lose and add nothing."""
    run = runs(started=True)
    facts = told(run, lie)
    assert (facts.evidence.channel_error, facts.evidence.wait_status, facts.closed) == (None, 0, CLOSED)
    assert os.pread(run.stdout_fd, 10, 0) == stdout
