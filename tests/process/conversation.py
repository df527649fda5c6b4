"""A whole conversation with an agent, without the rest of a run."""

from __future__ import annotations

import os
import select
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.guest.messages import FREE, PLAIN
from x07_sandbox.channel import streams
from x07_sandbox.channel.connection import Connection
from x07_sandbox.channel.link import State, Stream
from x07_sandbox.channel.messages import (
    Close,
    Closed,
    CommandLimits,
    Exec,
    Exited,
    Failed,
    InputFile,
    Left,
    Mount,
    Output,
    Room,
    Seed,
    Stop,
)
from x07_sandbox.channel.streams import Event, Role

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from x07_sandbox.backends.jailed import StreamInstance

LIMITS = CommandLimits(mem_bytes=256 << 20, tasks=64, cpu_ms=20_000, fds=128, core_bytes=0)
TMP_BYTES = 16 << 20
ENV = {"PATH": "/usr/bin:/bin", "HOME": "/opt/x07", "LANG": "C.UTF-8"}
PROGRAM = "/x07/in/program.py"
MOST_S = 30.0


@dataclass(kw_only=True)
class Ended:
    """How a program ended. last: EXITED, or FAILED. closed: CLOSED, after EXITED. output: received bytes by stream."""

    last: Exited | Failed
    closed: Closed | None
    output: dict[Stream, bytearray]

    @property
    def exited(self) -> Exited:
        """The report about its end."""
        assert isinstance(self.last, Exited), self.last
        return self.last

    @property
    def failed(self) -> Failed:
        """The report that it was not executed."""
        assert isinstance(self.last, Failed), self.last
        return self.last

    @property
    def left(self) -> Closed:
        """The report about what it left."""
        assert self.closed is not None
        return self.closed

    @property
    def code(self) -> int:
        """The exit code, negative for a signal."""
        return os.waitstatus_to_exitcode(self.exited.wait_status)

    @property
    def stdout(self) -> str:
        """Its standard output."""
        return self.output.get(Stream.STDOUT, bytearray()).decode("utf-8", "replace")

    @property
    def stderr(self) -> str:
        """Its standard error."""
        return self.output.get(Stream.STDERR, bytearray()).decode("utf-8", "replace")


@dataclass(kw_only=True)
class Program:
    """The program to run.

    files: by their paths in /x07/in: mode, kind ("file", "archive" or "tree"), content.
    input_first: whether standard input, which must fit into its window, is sent before the files.
    """

    argv: list[str]
    files: Mapping[str, tuple[int, str, bytes]] = field(default_factory=dict)
    stdin: bytes = b""
    input_first: bool = False
    env: Mapping[str, str] = field(default_factory=lambda: ENV)
    cwd: str = "/opt/x07"
    limits: Mapping[str, int] = field(default_factory=dict)
    confine: Mapping[str, Any] = field(default_factory=dict)
    mounts: list[Mount] = field(default_factory=list)
    output: Output | None = None
    left: Left | None = None


def python(source: str, *words: str, **how: Any) -> Program:  # noqa: ANN401 - fields of Program
    """Return a Python program."""
    files = {PROGRAM: (0o444, "file", source.encode()), **how.pop("files", {})}
    return Program(argv=["/usr/bin/python3", PROGRAM, *words], files=files, **how)


class Conversation:
    """The host's side, from HELLO on."""

    def __init__(self, instance: StreamInstance) -> None:
        self.instance = instance
        self.connection = Connection(instance.channel_fd, Role.HOST)
        self.link = self.connection.link
        self.nonce = os.urandom(16)
        self.output: dict[Stream, bytearray] = {}
        self.last: Exited | Failed | None = None
        self.closed: Closed | None = None
        self.until = time.monotonic() + MOST_S

    def run(self, program: Program, *, on_output: Callable[[Conversation], None] | None = None) -> Ended:
        """Run it to its end. on_output: called once, on the first output."""
        self.start(program)
        while self.closed is None and not isinstance(self.last, Failed):
            self.turn()
            if on_output is not None and self.output.get(Stream.STDOUT):
                on_output(self)
                on_output = None
        assert self.last is not None
        return Ended(last=self.last, closed=self.closed, output=self.output)

    def start(self, program: Program) -> None:
        """Start it; its files and its input are queued."""
        while self.link.state is State.WAITING:
            self.turn()
        self.link.send(Seed(1, bytes(64), self.nonce, bytes(15) + b"\1"))
        while self.link.state is not State.READY:
            self.turn()
        limits = LIMITS._replace(**program.limits)
        out_writable = program.output is not None or (program.left is not None and program.left.files > 0)
        opening = PLAIN._replace(
            mem_bytes=limits.mem_bytes,
            tasks=limits.tasks,
            tmp_bytes=TMP_BYTES,
            files=[InputFile(path, mode, kind, len(data)) for path, (mode, kind, data) in program.files.items()],
            mounts=program.mounts,
            confine=FREE._replace(**program.confine),
            out_writable=out_writable,
            room=Room(1 << 20, 2 << 20),
        )
        self.link.send(opening)
        self.link.send(Exec(1, program.argv, dict(program.env), program.cwd, limits))
        self.link.send(Close(1, program.output, program.left))
        parts = [(Stream.INPUT, number, content) for number, (_, _, content) in enumerate(program.files.values())]
        parts.insert(0 if program.input_first else len(parts), (Stream.STDIN, 1, program.stdin))
        for stream, subject, content in parts:
            self.send(self.link.open(stream, subject), content)

    def send(self, number: int, data: bytes) -> None:
        """Send all input and its end; the program may end before."""
        while data and self.last is None:
            count = self.link.streams.send(number, data)
            data = data[count:]
            if not count:
                self.turn()
        self.link.streams.finish(number)

    def stop(self) -> None:
        """Request the program's end."""
        self.link.send(Stop(1, 9))

    def turn(self) -> None:
        """Write queued bytes, and read what has arrived."""
        assert self.connection.flush(), self.instance.console_tail()
        poll = select.poll()
        poll.register(self.connection.fd, select.POLLIN | (select.POLLOUT if self.link.pending() else 0))
        poll.register(self.instance.pidfd, select.POLLIN)
        left_s = self.until - time.monotonic()
        assert left_s > 0, f"in time; state {self.link.state}, {self.instance.console_tail()}"
        ready = dict(poll.poll(left_s * 1000))
        assert self.instance.pidfd not in ready, self.instance.console_tail()
        if not ready.get(self.connection.fd, 0) & (select.POLLIN | select.POLLHUP):
            return
        events = self.connection.read()
        assert events is not None, self.instance.console_tail()
        for event in events:
            if isinstance(event, (Exited, Failed)):
                self.last = event
            elif isinstance(event, Closed):
                self.closed = event
            elif isinstance(event, Event) and event.type == streams.DATA:
                self.output.setdefault(Stream(event.code), bytearray()).extend(event.data)
                self.link.streams.consumed(event.stream, len(event.data))
