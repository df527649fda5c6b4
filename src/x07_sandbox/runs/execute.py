"""One phase of a run: the conversation with the agent, and the only place where output caps and deadlines are kept.

The loop waits for the channel, the machine's own streams and end, the program's input, slow readers of its output,
and a request to cancel. Nothing in it blocks on any of them.
"""

from __future__ import annotations

import hashlib
import os
import select
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec

from x07_sandbox.backends.base import MISTIMED, MISTIMED_FIX
from x07_sandbox.channel.connection import Connection
from x07_sandbox.channel.frames import DATA_MAX, DENIED_MAX, PROTOCOL, Kind, Role, Stream
from x07_sandbox.channel.link import Control, Credit, Data, Eof, Event, State
from x07_sandbox.errors import PeerError
from x07_sandbox.host import settings
from x07_sandbox.host.clocks import Deadline, unix_ns
from x07_sandbox.plan.outcomes import Evidence, Stage
from x07_sandbox.runs.streams import Cancel, InFile, OutFile, Sink

if TYPE_CHECKING:
    from x07_sandbox.backends.base import Instance
    from x07_sandbox.files.incoming import Incoming
else:
    Incoming = Any  # its module is loaded only where files may change

_LOST_S: Final = 5.0  # how long a machine whose channel has ended may take to end itself, so that we can say how
# How often the channel is read once the time is up: 1 MiB, which is more than the guest may send of its own accord; and
# how long what of it is still in the machine may take to follow, if we were there all the time.
_LATE_TURNS: Final = 8
_LATE_S: Final = 0.1
_FILL: Final = 256 * 1024  # bytes queued for the guest at most, besides the windows


class PhaseRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What one phase is to do. Descriptors and sinks are lent.

    mounts: where trees go, as START has them. changes: takes what comes back of them, if anything does.
    on_started: called when the program runs. stdin_fd: where the program's input is streamed from; None for none.
    limits: the agent's share of the plan: mem_bytes, tasks, cpu_ms, fds, core_bytes, tmp_bytes.
    confine: what the policy forbids beyond these, as START has it.
    """

    job_id: str
    phase: str
    argv: list[str]
    env: dict[str, str]
    cwd: str
    files: tuple[InFile, ...]
    limits: dict[str, int]
    confine: dict[str, Any]
    wall_ms: int
    stdin_fd: int | None
    stdout: Sink
    stderr: Sink
    output: OutFile | None
    cancel: Cancel
    mounts: list[dict[str, Any]] = []
    changes: Incoming | None = None
    on_started: Callable[[], None] = lambda: None


class PhaseFacts(msgspec.Struct):
    """What is known after a phase: the evidence, the guest's own counters, and when what happened.

    unanswered: the machine ended, or its time for booting did, before it answered; nobody cancelled.
    mistimed: unanswered, and why: see `Instance.mistimed`.
    refused: what the guest says that it saw refused: bodies of DENIED.
    stderr_tail: of a program that did not end well.
    times_ms: from the release of the machine to: hello, seeded, started, exited, end.
    input_sha256: of the program's input, None if it was not read to its end. input_problem: why reading it failed.
    """

    evidence: Evidence
    unanswered: bool = False
    mistimed: bool = False
    usage: dict[str, Any] = msgspec.field(default_factory=dict)
    refused: list[dict[str, Any]] = msgspec.field(default_factory=list)
    stderr_tail: bytes = b""
    times_ms: dict[str, float] = msgspec.field(default_factory=dict)
    input_sha256: str | None = None
    input_problem: str = ""


class Phase:
    """The loop of one phase. Made, run once, and thrown away."""

    def __init__(self, request: PhaseRequest, instance: Instance) -> None:
        self.request = request
        self.instance = instance
        self.cold = instance.begun == "cold"  # else its agent greeted whoever had it saved, and waits
        state = State.WAITING if self.cold else State.WARM
        self.connection = Connection(instance.channel_fd, Role.HOST, state)
        self.link = self.connection.link
        self.nonce = os.urandom(16)
        self.stage = Stage.BOOT
        self.deadline = Deadline.after(settings.BOOT_S if self.cold else settings.CLONE_S)
        self.begun = time.monotonic()
        self.times_ms: dict[str, float] = {}
        self.seen: dict[str, Any] = {}  # evidence so far, under the names of `Evidence`
        self.usage: dict[str, Any] = {}
        self.refused: list[dict[str, Any]] = []
        self.over = False
        self.late_turns, self.late_s = 0, 0.0
        self.asked_to_stop = False
        self.sent = [0] * len(request.files)
        self.input = bytearray()
        self.input_hash = hashlib.sha256()
        self.input_problem = ""
        self.input_done = request.stdin_fd is None
        self.to_come: set[int] = set()  # streams, once the program has ended
        self.sinks = {Stream.STDOUT: request.stdout, Stream.STDERR: request.stderr}

    def run(self) -> PhaseFacts:
        """Run to the end, whatever it is."""
        self.instance.release()
        if not self.cold:
            self._seed()
        while not self.over:
            try:
                self._turn()
            except PeerError as exc:
                self._end(channel_error=f"{exc.what}: {exc.why}")
        self._mark("end")
        if self.seen.get("wait_status") is None:
            self.seen["console_tail"] = self.instance.console_tail()
        unanswered = self.stage is Stage.BOOT and "cancelled_by" not in self.seen
        mistimed = unanswered and self.cold and self.instance.mistimed()
        if mistimed:
            self.seen["setup_failure"] = f"{MISTIMED}; {MISTIMED_FIX}"
        return PhaseFacts(
            evidence=Evidence(stage=self.stage, **self.seen),
            unanswered=unanswered,
            mistimed=mistimed,
            usage=self.usage,
            refused=self.refused,
            times_ms=self.times_ms,
            input_sha256=self._input_sha256(),
            input_problem=self.input_problem,
        )

    def _input_sha256(self) -> str | None:
        """Digest of the input, if it was read to its end: of a part of unknown length it would say nothing."""
        return self.input_hash.hexdigest() if self.input_done and not self.input_problem else None

    # one turn

    def _turn(self) -> None:
        self._fill()  # first: that there is room for more is progress, by which a deadline moves
        if self._time_is_up():
            return
        if not self.connection.flush():
            self._lost()
            return
        for fd, mask in self._poll().poll(self.deadline.left_s() * 1000 + 1):
            self._ready(fd, mask)
            if self.over:
                return

    def _poll(self) -> select.poll:
        poll = select.poll()
        poll.register(self.instance.channel_fd, select.POLLIN | (select.POLLOUT if self.link.pending() else 0))
        for fd in (self.instance.pidfd, self.request.cancel.fd, *self.instance.side_fds()):
            poll.register(fd, select.POLLIN)
        if self._wants_input():
            poll.register(self.request.stdin_fd or 0, select.POLLIN)
        for sink in self.sinks.values():
            if sink.progress_fd is not None:
                poll.register(sink.progress_fd, select.POLLIN)
        return poll

    def _ready(self, fd: int, mask: int) -> None:
        if fd == self.request.cancel.fd:
            self._end(cancelled_by=self.request.cancel.signal or 0)
        elif fd == self.instance.channel_fd:
            if mask & (select.POLLIN | select.POLLHUP | select.POLLERR):
                self._receive()
        elif fd == self.instance.pidfd:
            self._lost()
        elif any(fd == sink.progress_fd for sink in self.sinks.values()):
            self._pump(fd)
        elif fd == self.request.stdin_fd:
            self._read_input()
        else:
            self.instance.drain(fd)

    def _time_is_up(self) -> bool:
        """Act on a deadline that has passed; whether this is the end.

        What had come by then is taken first: it may be we who are late, stopped by Ctrl-Z say, or on a busy host.
        """
        if self.over or not self.deadline.passed():
            self.late_turns = 0
            return self.over
        if not self.late_turns:
            self.late_s = settings.STOPPED_S if self.deadline.missed() else _LATE_S
        if self.late_turns < _LATE_TURNS and self._has_come(self.late_s if self.late_turns else 0.0):
            self.late_turns += 1
            return False
        if self.stage is Stage.BOOT:
            self._end(boot_timeout=True)
        elif self.stage is Stage.RUN and not self.asked_to_stop:
            # The deadline is ours and has passed, whatever the guest says from here on; it may still tell how it stood.
            self._stop(deadline_passed=True)
        elif self.asked_to_stop:
            self._end()
        else:
            self._end(deadline_passed=True)
        return self.over

    def _has_come(self, wait_s: float) -> bool:
        """Whether a word of the guest's, of the machine's end or of the caller's is there, or comes in that time."""
        poll = select.poll()
        for fd in (self.instance.channel_fd, self.instance.pidfd, self.request.cancel.fd):
            poll.register(fd, select.POLLIN)
        return bool(poll.poll(wait_s * 1000))

    # what comes from the guest

    def _receive(self) -> None:
        events = self.connection.read()
        if events is None:
            self._lost()
            return
        for event in events:
            self._take(event)
            if self.over:
                return

    def _take(self, event: Event) -> None:
        if isinstance(event, Control):
            self._take_control(event)
        elif isinstance(event, Data):
            self._take_data(event)
        elif isinstance(event, Eof) and event.stream in self.to_come:
            self._arrived(event.stream)
        elif isinstance(event, Credit):
            return  # `_fill` looks at the windows anyway

    def _arrived(self, stream: int) -> None:
        output = self.request.output
        if stream == Stream.OUTPUT_FILE and output is not None:
            output.complete = output.size == self.usage.get("output_bytes")
        self.to_come.discard(stream)
        if not self.to_come:
            self._end()

    def _take_control(self, event: Control) -> None:
        body = event.body
        if event.kind is Kind.HELLO:
            self._greet(body["protocol"])
        elif event.kind is Kind.SEEDED:
            if body["nonce"] != self.nonce:
                raise PeerError("bad SEEDED frame", "it does not answer our seed")
            self._start()
        elif event.kind is Kind.STARTED:
            self._mark("started")
            self.request.on_started()
            self.stage = Stage.RUN
            self.deadline = Deadline.after(self.request.wall_ms / 1000)
        elif event.kind is Kind.FAILED:
            not_executed = body["errno"] if body["stage"] == "exec" else 0
            self._end(setup_failure=f"{body['stage']}: {body['message']}", not_executed=not_executed)
        elif event.kind is Kind.DENIED:
            if len(self.refused) >= DENIED_MAX:
                raise PeerError("bad DENIED frame", f"there are more than {DENIED_MAX}")
            self.refused.append(body)
        elif event.kind is Kind.EXITED:
            self._exited(body)

    def _greet(self, protocol: int) -> None:
        if protocol != PROTOCOL:
            raise PeerError("bad HELLO frame", f"the agent speaks protocol {protocol}, and this is {PROTOCOL}")
        self._mark("hello")
        if self.deadline.passed():
            self.deadline = Deadline.after(settings.CLONE_S)  # it was in time; we were not
        self._seed()

    def _seed(self) -> None:
        seed = {
            "unix_ns": unix_ns(),
            "entropy": os.urandom(64),
            "nonce": self.nonce,
            "machine_id": os.urandom(16),
        }
        self.link.send(Kind.SEED, seed)

    def _start(self) -> None:
        self._mark("seeded")
        self.stage = Stage.SETUP
        self.deadline = Deadline.after(settings.COPY_IN_S)
        request = self.request
        files = [
            {"path": file.path, "mode": file.mode, "kind": file.kind, "bytes": file.size} for file in request.files
        ]
        output = (
            None if request.output is None else {"path": request.output.path, "max_bytes": request.output.max_bytes}
        )
        self.link.send(
            Kind.START,
            {
                "run_id": request.job_id,
                "hostname": settings.GUEST_HOSTNAME,
                "phase": request.phase,
                "argv": request.argv,
                "env": request.env,
                "cwd": request.cwd,
                "files": files,
                "mounts": request.mounts,
                "limits": request.limits,
                "confine": request.confine,
                "output": output,
            },
        )

    def _take_data(self, event: Data) -> None:
        if event.stream == Stream.OUTPUT_FILE:
            output = self.request.output
            if output is None or not output.take(event.payload):
                raise PeerError("bad data", "an output file that was not asked for, or is larger than announced")
            self.link.consumed(event.stream, len(event.payload))
            return
        if event.stream == Stream.CHANGES:
            if Stream.CHANGES not in self.to_come or self.request.changes is None:
                raise PeerError("bad data", "changes that were not asked for")
            self.link.consumed(event.stream, len(event.payload))
            if not self.request.changes.take(event.payload):
                self._arrived(Stream.CHANGES)
            return
        sink = self.sinks[Stream(event.stream)]
        self.link.consumed(event.stream, sink.take(event.payload))
        # What still comes of a program that is to end is counted no more.
        if sink.overflow and not self.asked_to_stop:
            if self.request.changes is None:
                self._end(output_overflow=sink.name)
            else:
                self._stop(output_overflow=sink.name)

    def _exited(self, body: dict[str, Any]) -> None:
        self._mark("exited")
        self.usage = body
        for name in ("wait_status", "oom_kills", "cpu_exceeded"):
            self.seen[name] = body[name]
        if self.asked_to_stop:
            # What the guest says after our STOP tells how things stood; the end itself was our doing.
            self.seen["stopped"] = body["stopped"]
        else:
            self.stage = Stage.COLLECT
        self.deadline = Deadline.after(settings.CHANGES_OUT_S)
        output = self.request.output
        if output is not None and body["output_bytes"] is not None and not self.asked_to_stop:
            output.max_bytes = min(output.max_bytes, body["output_bytes"])  # it is held to what it announced
            self.to_come.add(Stream.OUTPUT_FILE)
        if self.request.changes is not None:
            self.to_come.add(Stream.CHANGES)
        if not self.to_come:
            self._end()

    # what goes to the guest

    def _fill(self) -> None:
        """Queue as much for the guest as its windows take."""
        if self.link.state not in {State.PREPARING, State.RUNNING}:
            return
        for index, file in enumerate(self.request.files):
            stream = Stream.FIRST_FILE + index
            while self.sent[index] < file.size and self.link.pending() < _FILL and self.link.window(stream):
                data = os.pread(
                    file.fd, min(DATA_MAX, self.link.window(stream), file.size - self.sent[index]), self.sent[index]
                )
                if not data:
                    self._end(setup_failure=f"{file.path} became shorter while it was read")
                    return
                self.sent[index] += self.link.send_data(stream, data)
                if self.stage is Stage.SETUP:  # it takes what comes, however much that is
                    self.deadline = Deadline.after(settings.COPY_IN_S)
            if self.sent[index] == file.size:
                self.link.end_stream(stream)
        if self.input and self.link.pending() < _FILL:
            del self.input[: self.link.send_data(Stream.STDIN, self.input)]
        if self.input_done and not self.input:
            self.link.end_stream(Stream.STDIN)

    def _wants_input(self) -> bool:
        ready = self.link.state in {State.PREPARING, State.RUNNING}
        return ready and not self.input_done and not self.input and self.link.window(Stream.STDIN) > 0

    def _read_input(self) -> None:
        try:
            data = os.read(self.request.stdin_fd or 0, DATA_MAX)
        except BlockingIOError:
            return
        except OSError as exc:
            data = b""
            if not os.isatty(self.request.stdin_fd or 0):  # a terminal that hung up has ended, and that is all
                self.input_problem = exc.strerror or str(exc)
        self.input += data
        self.input_hash.update(data)
        self.input_done = not data

    def _pump(self, fd: int) -> None:
        for stream, sink in self.sinks.items():
            if sink.progress_fd == fd:
                self.link.consumed(stream, sink.pump())
                return

    # the end

    def _lost(self) -> None:
        """The channel or the machine has ended: give it a moment to say how."""
        limit = Deadline.after(_LOST_S)
        poll = select.poll()
        poll.register(self.instance.pidfd, select.POLLIN)
        for fd in self.instance.side_fds():
            poll.register(fd, select.POLLIN)
        while self.instance.exit_status() is None and not limit.passed():
            for fd, _ in poll.poll(limit.left_s() * 1000):
                if fd != self.instance.pidfd:
                    self.instance.drain(fd)
                    if fd not in self.instance.side_fds():
                        poll.unregister(fd)
        self._end(vmm_status=self.instance.exit_status())

    def _stop(self, **seen: object) -> None:
        """Have the program ended; the guest may still say how things stood, and hand over what was changed."""
        self.seen.update(seen)
        self.asked_to_stop = True
        self.link.send(Kind.STOP, {})
        self.deadline = Deadline.after(settings.STOPPED_S)

    def _end(self, **seen: object) -> None:
        self.seen.update(seen)
        self.over = True

    def _mark(self, name: str) -> None:
        self.times_ms[name] = round((time.monotonic() - self.begun) * 1000, 1)


def drain(sinks: tuple[Sink, ...], cancel: Cancel) -> bool:
    """Give slow readers the rest of what they have coming, at most one window a stream; False if a cancel came first.

    Without a deadline, as with any pipe: the machine is gone, and nobody but the reader's owner waits.
    """
    while fds := [sink.progress_fd for sink in sinks if sink.progress_fd is not None]:
        poll = select.poll()
        for fd in (cancel.fd, *fds):
            poll.register(fd, select.POLLIN)
        for fd, _ in poll.poll():
            if fd == cancel.fd:
                return False
            for sink in sinks:
                if sink.progress_fd == fd:
                    sink.pump()
    return True
