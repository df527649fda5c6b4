"""A whole conversation with an agent, without the rest of a run."""

from __future__ import annotations

import os
import select
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from x07_sandbox.channel.connection import Connection
from x07_sandbox.channel.frames import Kind, Role, Stream
from x07_sandbox.channel.link import Control, Data, Eof, State

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from x07_sandbox.backends.process.start import ProcessInstance

LIMITS = {
    "mem_bytes": 256 << 20,
    "tasks": 64,
    "cpu_ms": 20_000,
    "fds": 128,
    "core_bytes": 0,
    "tmp_bytes": 16 << 20,
}
FREE: dict[str, Any] = {
    "threads": True,
    "spawn": True,
    "execute": True,
    "programs": None,
    "prefixes": [],
    "alone": True,
}
ENV = {"PATH": "/usr/bin:/bin", "HOME": "/opt/x07", "LANG": "C.UTF-8"}
PROGRAM = "/x07/in/program.py"
MOST_S = 30.0


@dataclass(kw_only=True)
class Ended:
    """How a program ended. body: of EXITED or FAILED. streams: received bytes by stream."""

    kind: Kind
    body: dict[str, Any]
    streams: dict[int, bytearray]

    @property
    def code(self) -> int:
        """The exit code, negative for a signal."""
        assert self.kind is Kind.EXITED, self.body
        return os.waitstatus_to_exitcode(self.body["wait_status"])

    @property
    def stdout(self) -> str:
        """Its standard output."""
        return self.streams.get(Stream.STDOUT, bytearray()).decode("utf-8", "replace")

    @property
    def stderr(self) -> str:
        """Its standard error."""
        return self.streams.get(Stream.STDERR, bytearray()).decode("utf-8", "replace")


@dataclass(kw_only=True)
class Program:
    """The program to run.

    files: by their paths in /x07/in: mode, kind ("file", "archive" or "tree"), content.
    """

    argv: list[str]
    files: Mapping[str, tuple[int, str, bytes]] = field(default_factory=dict)
    stdin: bytes = b""
    env: Mapping[str, str] = field(default_factory=lambda: ENV)
    cwd: str = "/opt/x07"
    limits: Mapping[str, int] = field(default_factory=dict)
    confine: Mapping[str, Any] = field(default_factory=dict)
    mounts: list[dict[str, Any]] = field(default_factory=list)
    output: dict[str, Any] | None = None
    left: dict[str, int] | None = None


def python(source: str, *words: str, **how: Any) -> Program:  # noqa: ANN401 - fields of Program
    """Return a Python program."""
    files = {PROGRAM: (0o444, "file", source.encode()), **how.pop("files", {})}
    return Program(argv=["/usr/bin/python3", PROGRAM, *words], files=files, **how)


class Conversation:
    """The host's side, from HELLO on."""

    def __init__(self, instance: ProcessInstance) -> None:
        self.instance = instance
        self.connection = Connection(instance.channel_fd, Role.HOST)
        self.link = self.connection.link
        self.nonce = os.urandom(16)
        self.streams: dict[int, bytearray] = {}
        self.to_come: set[int] = set()
        self.last: Control | None = None
        self.until = time.monotonic() + MOST_S

    def run(self, program: Program, *, on_output: Callable[[Conversation], None] | None = None) -> Ended:
        """Run it to its end. on_output: called once, on the first output."""
        self.start(program)
        while self.last is None or self.to_come:
            self.turn()
            if on_output is not None and self.streams.get(Stream.STDOUT):
                on_output(self)
                on_output = None
        return Ended(kind=self.last.kind, body=self.last.body, streams=self.streams)

    def start(self, program: Program) -> None:
        """Start it; its files and its input are queued."""
        while self.link.state is State.WAITING:
            self.turn()
        seed = {"unix_ns": 1, "entropy": bytes(64), "nonce": self.nonce, "machine_id": bytes(15) + b"\1"}
        self.link.send(Kind.SEED, seed)
        while self.link.state is not State.READY:
            self.turn()
        files = [
            {"path": path, "mode": mode, "kind": kind, "bytes": len(content)}
            for path, (mode, kind, content) in program.files.items()
        ]
        body = {
            "run_id": "test",
            "hostname": "x07",
            "phase": "run",
            "argv": program.argv,
            "env": dict(program.env),
            "cwd": program.cwd,
            "files": files,
            "mounts": program.mounts,
            "limits": LIMITS | dict(program.limits),
            "confine": FREE | dict(program.confine),
            "output": program.output,
            "network": None,
            "left": program.left,
            "room": {"file_bytes": 1 << 20, "total_bytes": 2 << 20},
        }
        if any(mount["changes"] for mount in program.mounts):
            self.to_come.add(Stream.CHANGES)
        if program.output is not None:
            self.to_come.add(Stream.OUTPUT_FILE)
        if program.left is not None and program.left["files"]:
            self.to_come.add(Stream.LEFT_FILES)
        self.link.send(Kind.START, body)
        for number, (_, _, content) in enumerate(program.files.values()):
            self.send(Stream.FIRST_FILE + number, content)
        self.send(Stream.STDIN, program.stdin)

    def send(self, stream: int, data: bytes) -> None:
        """Send all input and its end; the program may end before."""
        while data and self.last is None:
            count = self.link.send_data(stream, data)
            data = data[count:]
            if not count:
                self.turn()
        if self.last is None:
            self.link.end_stream(stream)

    def stop(self) -> None:
        """Request the program's end."""
        self.link.send(Kind.STOP, {})

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
            if isinstance(event, Control) and event.kind in {Kind.EXITED, Kind.FAILED}:
                self.last = event
                if event.kind is Kind.FAILED or not event.body["output_bytes"]:
                    self.to_come.discard(Stream.OUTPUT_FILE)
                if event.kind is Kind.EXITED and not event.body["left_files"]:
                    self.to_come.discard(Stream.LEFT_FILES)
                if event.kind is Kind.FAILED:
                    self.to_come.clear()
            elif isinstance(event, Data):
                self.streams.setdefault(event.stream, bytearray()).extend(event.payload)
                self.link.consumed(event.stream, len(event.payload))
            elif isinstance(event, Eof):
                self.to_come.discard(event.stream)
