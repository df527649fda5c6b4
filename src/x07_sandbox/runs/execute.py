"""The conversation with the guest agent during one phase. One loop also enforces output limits and deadlines."""

from __future__ import annotations

import hashlib
import os
import select
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec

from x07_sandbox.backends.handshake import input_poll, read_deadline, wait_for_exit
from x07_sandbox.channel.frames import DATA_MAX, DENIED_MAX, Kind, Stream
from x07_sandbox.channel.link import Control, Data, Eof, Event, State
from x07_sandbox.errors import PeerError
from x07_sandbox.host import settings
from x07_sandbox.host.clocks import Deadline
from x07_sandbox.plan.outcomes import Evidence, Stage

if TYPE_CHECKING:
    from x07_sandbox.backends.base import Instance
    from x07_sandbox.host.cancel import Cancel
    from x07_sandbox.runs.phase import PhaseSpec, PhaseStreams
    from x07_sandbox.runs.streams import Sink

_FILL: Final = 256 * 1024  # limit for bytes queued for the guest


class PhaseFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The facts that are known after a phase.

    usage: counters that the guest reported.
    refused: contents of the DENIED frames.
    times_ms: milliseconds from the moment the instance was released to run until the events `hello`, `seeded`,
    `started`, `exited`, `end`.
    input_sha256: digest of the input; None if the input was not read to its end.
    input_problem: why the input could not be read to its end; empty if there was no problem.
    """

    evidence: Evidence
    usage: dict[str, Any] = {}
    refused: list[dict[str, Any]] = []
    times_ms: dict[str, float] = {}
    input_sha256: str | None = None
    input_problem: str = ""


class Phase:
    """The event loop of one phase. Each phase needs a new object."""

    def __init__(self, spec: PhaseSpec, instance: Instance, streams: PhaseStreams) -> None:
        self.spec = spec
        self.instance = instance
        self.streams = streams
        self.connection = instance.greeting.connection
        self.link = self.connection.link
        self.stage = Stage.SETUP
        self.deadline = Deadline.after(settings.COPY_IN_S)
        self.times_ms = dict(instance.greeting.times_ms)
        self.seen: dict[str, Any] = {}  # fields of `Evidence`
        self.usage: dict[str, Any] = {}
        self.refused: list[dict[str, Any]] = []
        self.over = False
        self.late: Deadline | None = None
        self.asked_to_stop = False
        self.sent = [0] * len(spec.files)
        self.input = bytearray()
        self.input_hash = hashlib.sha256()
        self.input_problem = ""
        self.input_done = streams.stdin_fd is None
        self.to_come: set[int] = set()  # streams still expected after the program's end
        self.sinks = {Stream.STDOUT: streams.stdout, Stream.STDERR: streams.stderr}

    def run(self) -> PhaseFacts:
        """Run the loop until the phase ends."""
        self._start()
        while not self.over:
            try:
                self._turn()
            except PeerError as exc:
                self._end(channel_error=f"{exc.what}: {exc.why}")
        self._mark("end")
        if self.seen.get("wait_status") is None:
            self.seen["console_tail"] = self.instance.console_tail()
        return PhaseFacts(
            evidence=Evidence(stage=self.stage, **self.seen),
            usage=self.usage,
            refused=self.refused,
            times_ms=self.times_ms,
            input_sha256=self.input_hash.hexdigest() if self.input_done and not self.input_problem else None,
            input_problem=self.input_problem,
        )

    def _turn(self) -> None:
        self._fill()  # first, since progress of a copy extends the deadline
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
        progress = [sink.progress_fd for sink in self.sinks.values() if sink.progress_fd is not None]
        stdin = [self.streams.stdin_fd or 0] if self._wants_input() else []
        # The order matters: handle data from the guest before the end of its stream.
        fds = self.instance.channel_fd, self.instance.pidfd, self.streams.cancel.fd
        gate = [] if self.streams.gate_fd is None or self.stage is Stage.COLLECT else [self.streams.gate_fd]
        poll = input_poll(*fds, *gate, *self.instance.side_fds(), *stdin, *progress)
        poll.register(self.instance.channel_fd, select.POLLIN | (select.POLLOUT if self.link.pending() else 0))
        return poll

    def _ready(self, fd: int, mask: int) -> None:
        if fd == self.streams.cancel.fd:
            self._end(cancelled_by=self.streams.cancel.signal or 0)
        elif fd == self.instance.channel_fd:
            if mask & (select.POLLIN | select.POLLHUP | select.POLLERR):
                self._receive()
        elif fd == self.instance.pidfd:
            self._lost()
        elif fd == self.streams.gate_fd:
            self._end(gate_lost=True)
        elif streams := [stream for stream, sink in self.sinks.items() if fd == sink.progress_fd]:
            self.link.consumed(streams[0], self.sinks[streams[0]].pump())
        elif fd == self.streams.stdin_fd:
            self._read_input()
        else:
            self.instance.drain(fd)

    def _time_is_up(self) -> bool:
        # Pending events are handled first: this process may be late, because of Ctrl-Z or a busy host.
        if self.over or not self.deadline.passed():
            self.late = None
            return self.over
        # If this process was stopped, the guest had to wait too, and needs time to send the rest.
        no_wait = self.late is None and not self.deadline.missed_while_stopped()
        self.late = self.late or read_deadline(self.deadline)
        wait_s = 0.0 if no_wait else self.late.left_s()
        pending = input_poll(self.instance.channel_fd, self.instance.pidfd, self.streams.cancel.fd)
        if not self.late.passed() and pending.poll(wait_s * 1000):
            return False
        if self.asked_to_stop:
            self._end()
        elif self.stage is Stage.RUN:
            # The verdict stays a timeout whatever the guest reports now, but the report may add details.
            self._stop(deadline_passed=True)
        else:
            self._end(deadline_passed=True)
        return self.over

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

    def _arrived(self, stream: int) -> None:
        output = self.spec.output
        if stream == Stream.OUTPUT_FILE and output is not None:
            output.complete = output.size == self.usage.get("output_bytes")
        self.to_come.discard(stream)
        if not self.to_come:
            self._end()

    def _take_control(self, event: Control) -> None:
        body = event.body
        if event.kind is Kind.STARTED:
            self._mark("started")
            self.streams.on_started()
            self.stage = Stage.RUN
            self.deadline = Deadline.after(self.spec.wall_ms / 1000)
        elif event.kind is Kind.FAILED:
            exec_errno = body["errno"] if body["stage"] == "exec" else 0
            self._end(setup_failure=f"{body['stage']}: {body['message']}", exec_errno=exec_errno)
        elif event.kind is Kind.DENIED:
            if len(self.refused) >= DENIED_MAX:
                raise PeerError("bad DENIED frame", f"there are more than {DENIED_MAX}")
            self.refused.append(body)
        elif event.kind is Kind.EXITED:
            self._exited(body)

    def _start(self) -> None:
        spec, output = self.spec, self.spec.output
        files = [{"path": file.path, "mode": file.mode, "kind": file.kind, "bytes": file.size} for file in spec.files]
        self.link.send(
            Kind.START,
            {
                "run_id": self.instance.record.job_id,
                "hostname": settings.GUEST_HOSTNAME,
                "phase": spec.name,
                "argv": spec.argv,
                "env": spec.env,
                "cwd": spec.cwd,
                "files": files,
                "mounts": list(spec.mounts),
                "limits": spec.limits,
                "confine": spec.confine.for_guest(),
                "output": None if output is None else {"path": output.path, "max_bytes": output.max_bytes},
                "network": spec.network,
                "left": spec.left,
                "room": spec.room,
            },
        )

    def _take_data(self, event: Data) -> None:
        if event.stream == Stream.OUTPUT_FILE:
            output = self.spec.output
            if output is None or not output.take(event.payload):
                raise PeerError("bad data", "an output file was not requested or is larger than announced")
            self.link.consumed(event.stream, len(event.payload))
            return
        if event.stream in {Stream.CHANGES, Stream.LEFT_FILES}:
            if event.stream not in self.to_come:
                raise PeerError("bad data", "changes were not requested")
            self.link.consumed(event.stream, len(event.payload))
            taker = self.spec.changes if event.stream == Stream.CHANGES else self.spec.left_files
            if not taker.take(event.payload):
                self._arrived(event.stream)
            return
        sink = self.sinks[Stream(event.stream)]
        self.link.consumed(event.stream, sink.take(event.payload))
        if sink.overflow and not self.asked_to_stop:
            self._stop(output_overflow=sink.name, output_max_bytes=sink.max_bytes)

    def _exited(self, body: dict[str, Any]) -> None:
        self._mark("exited")
        self.usage = body
        self.seen |= {name: body[name] for name in ("wait_status", "oom_kills", "cpu_exceeded", "cpu_us")}
        if self.asked_to_stop:
            self.seen["stopped"] = body["stopped"]
        else:
            self.stage = Stage.COLLECT
        self.deadline = Deadline.after(settings.CHANGES_OUT_S)
        output = self.spec.output
        if output is not None and body["output_bytes"] is not None and not self.asked_to_stop:
            output.max_bytes = min(output.max_bytes, body["output_bytes"])
            self.to_come.add(Stream.OUTPUT_FILE)
        if self.spec.changes is not None:
            self.to_come.add(Stream.CHANGES)
        if self.spec.left_files is not None and body["left_files"]:
            self.to_come.add(Stream.LEFT_FILES)
        if not self.to_come:
            self._end()

    def _fill(self) -> None:
        if self.link.state not in {State.PREPARING, State.RUNNING}:
            return
        for index, file in enumerate(self.spec.files):
            stream = Stream.FIRST_FILE + index
            while self.sent[index] < file.size and self.link.pending() < _FILL and self.link.window(stream):
                most = min(DATA_MAX, self.link.window(stream), file.size - self.sent[index])
                data = os.pread(file.fd, most, self.sent[index])
                if not data:
                    self._end(setup_failure=f"{file.path} was truncated while it was read")
                    return
                self.sent[index] += self.link.send_data(stream, data)
                if self.stage is Stage.SETUP:
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
            data = os.read(self.streams.stdin_fd or 0, DATA_MAX)
        except BlockingIOError:
            return
        except OSError as exc:
            data = b""
            if not os.isatty(self.streams.stdin_fd or 0):  # for a terminal it is a hangup, which is a normal end
                self.input_problem = exc.strerror or str(exc)
        self.input += data
        self.input_hash.update(data)
        self.input_done = not data

    def _lost(self) -> None:
        # If this process was stopped, `x07 kill` has asked it first and then ended the machine.
        self._end(instance_status=wait_for_exit(self.instance), cancelled_by=self.streams.cancel.signal)

    def _stop(self, **seen: object) -> None:
        """Ask the guest to end the program. The guest may still report its exit and changes. seen: evidence to add."""
        self.seen.update(seen)
        self.asked_to_stop = True
        self.link.send(Kind.STOP, {})
        self.deadline = Deadline.after(settings.STOPPED_S)

    def _end(self, **seen: object) -> None:
        self.seen.update(seen)
        self.over = True

    def _mark(self, name: str) -> None:
        self.times_ms[name] = round((time.monotonic() - self.instance.greeting.released_at) * 1000, 1)


def drain(sinks: tuple[Sink, ...], cancel: Cancel) -> bool:
    """Wait, without a deadline, until the readers of the output have taken all of it. Return False if cancelled."""
    while fds := [sink.progress_fd for sink in sinks if sink.progress_fd is not None]:
        for fd, _ in input_poll(cancel.fd, *fds).poll():
            if fd == cancel.fd:
                return False
            for sink in sinks:
                if sink.progress_fd == fd:
                    sink.pump()
    return True
