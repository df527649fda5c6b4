"""Sessions with an agent, without the rest of a run."""

from __future__ import annotations

import os
import select
import time
from collections import defaultdict
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
    Confine,
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


class Session:
    """The host's side of a session, from HELLO on. ended: the last report about each command."""

    def __init__(self, instance: StreamInstance) -> None:
        self.instance = instance
        self.connection = Connection(instance.channel_fd, Role.HOST)
        self.link = self.connection.link
        self.output: defaultdict[tuple[Stream, int], bytearray] = defaultdict(bytearray)
        self.ended: dict[int, Exited | Failed] = {}
        self.closed: Closed | None = None

    def open(self, files: list[InputFile], confine: Confine = FREE, **other: Any) -> None:  # noqa: ANN401 - fields of Open
        """Do the handshake and open the session."""
        self.wait(lambda: self.link.state is not State.WAITING)
        self.link.send(Seed(1, bytes(64), os.urandom(16), bytes(15) + b"\1"))
        self.wait(lambda: self.link.state is State.READY)
        limits = {"mem_bytes": LIMITS.mem_bytes, "tasks": LIMITS.tasks, "tmp_bytes": TMP_BYTES}
        room = Room(1 << 20, 2 << 20)
        self.link.send(PLAIN._replace(files=files, confine=confine, room=room, **(limits | other)))

    def send(self, number: int, data: bytes) -> None:
        """Write *data* to a stream of a command, which may end before."""
        left, command = data, self.link.subject(number)

        def sent() -> bool:
            nonlocal left
            if command not in self.ended:
                left = left[self.link.streams.send(number, left) :]
            return not left or command in self.ended

        self.wait(sent)

    def wait(self, done: Callable[[], bool]) -> None:
        """Take what the agent sends until *done* returns True."""
        until = time.monotonic() + MOST_S
        while not done():
            assert self.connection.flush(), self.instance.console_tail()
            poll = select.poll()
            poll.register(self.connection.fd, select.POLLIN | (select.POLLOUT if self.link.pending() else 0))
            poll.register(self.instance.pidfd, select.POLLIN)
            left_s = until - time.monotonic()
            assert left_s > 0, f"in time; state {self.link.state}, {self.instance.console_tail()}"
            ready = dict(poll.poll(left_s * 1000))
            assert self.instance.pidfd not in ready, self.instance.console_tail()
            if ready.get(self.connection.fd, 0) & (select.POLLIN | select.POLLHUP):
                events = self.connection.read()
                assert events is not None, self.instance.console_tail()
                for event in events:
                    self._take(event)

    def _take(self, event: object) -> None:
        if isinstance(event, (Exited, Failed)):
            self.ended[event.id] = event
        elif isinstance(event, Closed):
            self.closed = event
        elif isinstance(event, Event) and event.type == streams.DATA:
            self.output[Stream(event.code), self.link.subject(event.stream)] += event.data
            self.link.streams.consumed(event.stream, len(event.data))


class Conversation(Session):
    """A session with one program, which is command 1."""

    def run(self, program: Program, *, on_output: Callable[[Conversation], None] | None = None) -> Ended:
        """Run it to its end. on_output: called once, on the first output."""
        self.start(program)
        if on_output is not None:
            self.wait(lambda: (Stream.STDOUT, 1) in self.output)
            on_output(self)
        self.wait(lambda: self.closed is not None or isinstance(self.ended.get(1), Failed))
        output = {stream: data for (stream, _), data in self.output.items()}
        return Ended(last=self.ended[1], closed=self.closed, output=output)

    def start(self, program: Program) -> None:
        """Start it; its files and its input are queued."""
        limits = LIMITS._replace(**program.limits)
        self.open(
            [InputFile(path, mode, kind, len(data)) for path, (mode, kind, data) in program.files.items()],
            FREE._replace(**program.confine),
            mem_bytes=limits.mem_bytes,
            tasks=limits.tasks,
            mounts=program.mounts,
            out_writable=program.output is not None or (program.left is not None and program.left.files > 0),
        )
        self.link.send(Exec(1, program.argv, dict(program.env), program.cwd, limits))
        self.link.send(Close(1, program.output, program.left))
        parts = [(Stream.INPUT, number, content) for number, (_, _, content) in enumerate(program.files.values())]
        parts.insert(0 if program.input_first else len(parts), (Stream.STDIN, 1, program.stdin))
        for stream, subject, content in parts:
            number = self.link.open(stream, subject)
            self.send(number, content)
            self.link.streams.finish(number)

    def stop(self) -> None:
        """Request the program's end."""
        self.link.send(Stop(1, 9))
