"""The handshake with an agent, in two steps: the agent answers, then it becomes ready for a program."""

import os
import select
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from msgspec.structs import replace

from x07_sandbox.backends.base import FailureKind, Greeting, HandshakeFailure, Instance, NoAnswerError
from x07_sandbox.channel.connection import Connection
from x07_sandbox.channel.link import State
from x07_sandbox.channel.messages import PROTOCOL, Failed, Hello, Message, Seed, Seeded
from x07_sandbox.channel.streams import Event, Role
from x07_sandbox.errors import PeerError
from x07_sandbox.host import settings
from x07_sandbox.host.waiting import Deadline, input_poll, read_deadline, unix_ns
from x07_sandbox.policy.outcomes import Evidence

_EXIT_S: Final = 5.0  # for an instance whose channel ended to end itself, so that its exit status is known


def greet(
    instance: Instance,
    *,
    cancel_fd: int | None = None,
    meanwhile: Callable[[], object] = lambda: None,
    boot_s: float = settings.BOOT_S,
) -> None:
    """Release the instance, wait for its agent, send clock and entropy, and set `Instance.greeting`.

    cancel_fd: the wait ends once it is readable. meanwhile: called while the instance starts. boot_s: timeout
    of a boot, in seconds. Raises NoAnswerError; the caller stops the instance.
    """
    cold = instance.start_mode == "cold"  # the agent of any other start has sent HELLO already
    released_at = time.monotonic()
    deadline = Deadline.after(boot_s if cold else settings.CLONE_S)
    instance.release()
    talk = Handshake(instance, State.WAITING if cold else State.WARM, cancel_fd)
    if not cold:
        talk.seed()
        talk.connection.flush()
    meanwhile()
    failure = talk.until(State.GREETED, deadline) if cold else None
    if failure is None:
        if cold:
            talk.seed()
            if deadline.passed():  # the agent was in time, this process was not
                deadline = Deadline.after(settings.CLONE_S)
        failure = talk.until(State.READY, deadline)
    if failure is not None:
        talk.reached["end"] = time.monotonic()
    times_ms = {name: round((at - released_at) * 1000, 1) for name, at in talk.reached.items()}
    if failure is not None:
        raise NoAnswerError(instance, failure, times_ms)
    instance.greeting = Greeting(connection=talk.connection, released_at=released_at, times_ms=times_ms)


class Handshake:
    """One handshake. reached: when HELLO and SEEDED arrived, in seconds on the monotonic clock."""

    def __init__(self, instance: Instance, begin: State, cancel_fd: int | None = None) -> None:
        self.connection = Connection(instance.channel_fd, Role.HOST, begin)
        self.reached: dict[str, float] = {}
        self._instance = instance
        self._cancel_fd = cancel_fd
        self._nonce = os.urandom(16)

    def seed(self) -> None:
        """Queue clock, entropy, and a nonce that the answer must repeat."""
        self.connection.link.send(Seed(unix_ns(), os.urandom(64), self._nonce, os.urandom(16)))

    def until(
        self, wanted: State, deadline: Deadline, say: Mapping[State, Message] | None = None
    ) -> HandshakeFailure | None:
        """Exchange messages until the state *wanted*. Return None, or the failure. say: messages to send, by state."""
        link, late = self.connection.link, None
        while link.state is not wanted:
            if say and (message := say.get(link.state)):
                link.send(message)
            if not self.connection.flush():
                return self._ended("its channel ended")
            wait_s = deadline.left_s() + 0.001
            if deadline.passed():
                # Read what arrived in time first: this process may have been stopped or starved.
                wait_s = late.left_s() if late else 0.0
                late = late or read_deadline(deadline)
            ready = self._poll(wait_s)
            if late and (not ready or late.passed()):
                return self._failed("late", "it did not answer in time")
            for fd in ready:
                if failure := self._ready(fd):
                    return failure
        return None

    def _poll(self, wait_s: float) -> list[int]:
        cancel = () if self._cancel_fd is None else (self._cancel_fd,)
        poll = input_poll(self.connection.fd, self._instance.pidfd, *self._instance.side_fds(), *cancel)
        pending = self.connection.link.pending()
        poll.register(self.connection.fd, select.POLLIN | (select.POLLOUT if pending else 0))
        return [fd for fd, _ in poll.poll(wait_s * 1000)]

    def _ready(self, fd: int) -> HandshakeFailure | None:
        if fd == self._cancel_fd:
            return HandshakeFailure(kind="cancelled", why="the caller stopped it")
        if fd == self._instance.pidfd:
            return self._ended("it ended")
        if fd == self.connection.fd:
            return self._receive()
        self._instance.drain(fd)
        return None

    def _receive(self) -> HandshakeFailure | None:
        events = self.connection.read()
        if events is None:
            return self._ended("its channel ended")
        try:
            for event in events:
                if isinstance(event, Failed):
                    return HandshakeFailure(kind="failed", why=event.message, stage=event.stage)
                if not isinstance(event, Event):
                    self._take(event)
        except PeerError as exc:
            return self._failed("protocol", f"{exc.what}: {exc.why}")
        return None

    def _take(self, message: Message) -> None:
        if isinstance(message, Hello):
            if message.protocol != PROTOCOL:
                why = f"the agent uses protocol {message.protocol}, this host protocol {PROTOCOL}"
                raise PeerError("bad HELLO message", why)
            self.reached["hello"] = time.monotonic()
        elif isinstance(message, Seeded):
            if message.nonce != self._nonce:
                raise PeerError("bad SEEDED message", "its nonce is not the one that was sent")
            self.reached["seeded"] = time.monotonic()

    def _ended(self, why: str) -> HandshakeFailure:
        return self._failed("ended", why, wait_for_exit(self._instance))

    def _failed(self, kind: FailureKind, why: str, exit_status: int | None = None) -> HandshakeFailure:
        tail = self._instance.console_tail()
        return HandshakeFailure(kind=kind, why=why, exit_status=exit_status, console_tail=tail)


def wait_for_exit(instance: Instance) -> int | None:
    """Return the exit status of an instance whose channel or process just ended, or None if it takes too long."""
    limit = Deadline.after(_EXIT_S)
    poll = input_poll(instance.pidfd, *instance.side_fds())
    while instance.exit_status() is None and not limit.passed():
        for fd, _ in poll.poll(limit.left_s() * 1000):
            if fd != instance.pidfd:
                instance.drain(fd)
                if fd not in instance.side_fds():
                    poll.unregister(fd)
    return instance.exit_status()


def evidence_of(failure: HandshakeFailure, cancelled_by: int | None = None) -> Evidence:
    """Return the evidence for the job's outcome. cancelled_by: the signal that made the caller cancel the job."""
    from x07_sandbox.policy.outcomes import Evidence, Stage  # only imported after a failure

    found = Evidence(stage=Stage.BOOT, instance_status=failure.exit_status, console_tail=failure.console_tail)
    cause: dict[str, dict[str, Any]] = {
        "late": {"boot_timeout": True},
        "protocol": {"channel_error": failure.why},
        "failed": {"setup_failure": failure.text},
        "cancelled": {"cancelled_by": cancelled_by or 0},
    }
    return replace(found, **cause.get(failure.kind, {}))
