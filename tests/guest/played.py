"""A guest that a test plays over the host's own channel, and the machine and the clock around it."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from types import SimpleNamespace
from typing import TYPE_CHECKING, TypeVar, cast

from tests.guest.messages import GUEST, HOST, PLAIN, execute
from x07_sandbox.backends.base import Greeting
from x07_sandbox.channel.connection import Connection
from x07_sandbox.channel.link import State, Stream
from x07_sandbox.channel.messages import Exec, Message, Open, Started
from x07_sandbox.channel.streams import Event
from x07_sandbox.channel.trees import Entry, Kind
from x07_sandbox.host.waiting import Cancel, Deadline
from x07_sandbox.sessions.session import Session
from x07_sandbox.sessions.specs import input_files
from x07_sandbox.sessions.transfers import CommandStreams, InFile, Sink

if TYPE_CHECKING:
    from collections.abc import Callable

    from x07_sandbox.backends.base import Instance, StartMode
    from x07_sandbox.sessions.execution import Execution

M = TypeVar("M")
CHANGES = b"".join(
    entry.encoded()
    for entry in (Entry(Kind.ROOT, b"0"), *(Entry(Kind.DELETED, name) for name in (b"a", b"b")), Entry(Kind.END, b""))
)


class FakeClock:
    """A clock that only the test advances."""

    def __init__(self) -> None:
        self.now = 1000.0

    def after(self, seconds: float) -> Deadline:
        """Like `Deadline.after`."""
        return Deadline(self.now + seconds, clock=lambda: self.now)


class Ticking(FakeClock):
    """A clock that the test and each look at it advance."""

    @property
    def now(self) -> float:
        """The time in seconds."""
        self._now += 0.001
        return self._now

    @now.setter
    def now(self, value: float) -> None:
        self._now = value


class Machine:
    """A running VM as a phase sees it: its channel, and a stream beside it.

    A write to `side` wakes the phase, which then calls `on_drain`.
    """

    def __init__(self, channel_fd: int, start_mode: StartMode, stack: contextlib.ExitStack) -> None:
        self.channel_fd = channel_fd
        self.start_mode = start_mode
        self.greeting: Greeting | None = None
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
    """The guest's side: messages and streams from the test, and what was received."""

    def __init__(self, fd: int, state: State) -> None:
        self.connection = Connection(fd, GUEST, state)
        self.link = self.connection.link
        self.events: list[Message | Event] = []

    def say(self, *all_messages: Message) -> None:
        """Send messages."""
        for message in all_messages:
            self.link.send(message)
        self.flush()

    def stream(self, kind: Stream, data: bytes, subject: int = 0, *, ended: bool = True) -> int:
        """Open a stream and send *data*, which fits into its window. Return its number."""
        number = self.link.open(kind, subject)
        assert self.link.streams.send(number, data) == len(data)
        if ended:
            self.link.streams.finish(number)
        self.flush()
        return number

    def flush(self) -> None:
        """Send all queued bytes."""
        poll = select.poll()
        poll.register(self.connection.fd, select.POLLOUT)
        while self.link.pending():
            assert self.connection.flush()
            poll.poll(60_000)

    def next(self) -> Message | Event:
        """Wait for the next message or event."""
        poll = select.poll()
        poll.register(self.connection.fd, select.POLLIN)
        while not self.events:
            assert poll.poll(60_000), "nothing came"
            events = self.connection.read()
            assert events is not None, "the channel has ended"
            self.events += events
        return self.events.pop(0)

    def until(self, kind: type[M]) -> M:
        """Skip everything up to the next message of that kind."""
        while True:
            if isinstance(event := self.next(), kind):
                return event

    def until_event(self, kind: int) -> Event:
        """Skip everything up to the next frame of that type."""
        while (event := self.until(Event)).type != kind:
            pass
        return event


class Pair:
    """An open session, and its guest."""

    def __init__(self, stack: contextlib.ExitStack, clock: FakeClock, files: tuple[InFile, ...] = ()) -> None:
        self.clock = clock
        ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
        machine = Machine(ours.fileno(), "cold", stack)
        machine.greeting = Greeting(Connection(ours.fileno(), HOST, State.READY), 0.0, {})
        self.guest = Guest(theirs.fileno(), State.READY)
        cancel = stack.enter_context(contextlib.closing(Cancel()))
        opening = PLAIN._replace(files=input_files(files))
        self.session = Session(cast("Instance", machine), cancel, opening, files)
        self.turn()
        self.guest.until(Open)

    def start(self, number: int, wall_ms: int | None = None, *, started: bool = True) -> Execution:
        """Start a command. started: have the guest answer."""
        sinks = [Sink(name, keep_fd=None, live_fd=None, max_bytes=100) for name in ("stdout", "stderr")]
        given = CommandStreams(stdin_fd=None, stdout=sinks[0], stderr=sinks[1])
        command = self.session.execute(execute(number), given, wall_ms)
        self.turn()
        self.guest.until(Exec)
        if started:
            self.guest.say(Started(number))
            assert self.session.until(lambda: not command.starting)
        return command

    def turn(self) -> None:
        """Have the session do what is due."""
        self.session.until(lambda: False, 0.01)
