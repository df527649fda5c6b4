"""The conversation with an agent before and between jobs: until it answers, or has a place for a program ready."""

from __future__ import annotations

import os
import select
import time
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import replace

from x07_sandbox.backends.base import Greeting, NoAnswerError, Silence
from x07_sandbox.channel.connection import Connection
from x07_sandbox.channel.frames import PROTOCOL, Kind, Role
from x07_sandbox.channel.link import Control, State
from x07_sandbox.errors import PeerError
from x07_sandbox.host import settings
from x07_sandbox.host.clocks import Deadline, unix_ns

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from x07_sandbox.backends.base import Instance
    from x07_sandbox.plan.outcomes import Evidence

    Say = Mapping[State, tuple[Kind, Mapping[str, object]]]

_EXIT_S: Final = 5.0  # how long an instance whose channel has ended may take to end itself, so that we can say how
_LATE_S: Final = 0.2  # how long what was said in time may take to arrive once the time is up


def grace(deadline: Deadline) -> Deadline:
    """Until when to read what was said before *deadline*, which has passed: longer if this process stood still."""
    return Deadline.after(settings.STOPPED_S if deadline.missed_while_stopped() else _LATE_S)


def greet(instance: Instance, *, cancel_fd: int | None = None, meanwhile: Callable[[], object] | None = None) -> None:
    """Release the instance, wait for its agent, give it clock and entropy, and set `Instance.greeting`.

    cancel_fd: ends the wait when it becomes readable. meanwhile: called while the instance comes up.
    Raises NoAnswerError; the caller stops the instance.
    """
    cold = instance.start_mode == "cold"  # else its agent greeted whoever had it saved, and waits
    released_at = time.monotonic()
    deadline = Deadline.after(settings.BOOT_S if cold else settings.CLONE_S)
    instance.release()
    talk = Talk(instance, State.WAITING if cold else State.WARM, cancel_fd)
    if not cold:
        talk.seed()
        talk.connection.flush()
    if meanwhile is not None:
        meanwhile()
    silence = talk.until(State.GREETED, deadline) if cold else None
    if silence is None:
        if cold:
            talk.seed()
            if deadline.passed():  # the agent was in time; we were not
                deadline = Deadline.after(settings.CLONE_S)
        silence = talk.until(State.READY, deadline)
    if silence is not None:
        talk.reached["end"] = time.monotonic()
    times_ms = {name: round((at - released_at) * 1000, 1) for name, at in talk.reached.items()}
    if silence is not None:
        raise NoAnswerError(instance, silence, times_ms)
    instance.greeting = Greeting(connection=talk.connection, released_at=released_at, times_ms=times_ms)


class Talk:
    """One conversation. reached: when the agent said HELLO and SEEDED, on the monotonic clock."""

    def __init__(self, instance: Instance, begin: State, cancel_fd: int | None = None) -> None:
        self.connection = Connection(instance.channel_fd, Role.HOST, begin)
        self.reached: dict[str, float] = {}
        self._instance = instance
        self._cancel_fd = cancel_fd
        self._nonce = os.urandom(16)

    def seed(self) -> None:
        """Queue clock and entropy, and a nonce that the answer has to repeat."""
        seed = {"unix_ns": unix_ns(), "entropy": os.urandom(64), "nonce": self._nonce, "machine_id": os.urandom(16)}
        self.connection.link.send(Kind.SEED, seed)

    def until(self, wanted: State, deadline: Deadline, say: Say | None = None) -> Silence | None:
        """Talk until the state *wanted* is reached (None), or say why it was not. say: frames to send, by state."""
        link, late = self.connection.link, None
        while link.state is not wanted:
            if say and (frame := say.get(link.state)):
                link.send(*frame)
            if not self.connection.flush():
                return self._ended("its channel ended")
            wait_s = deadline.left_s() + 0.001
            if deadline.passed():
                # What had come by then is taken first: it may be we who are late, stopped by Ctrl-Z or on a busy host.
                wait_s = late.left_s() if late else 0.0
                late = late or grace(deadline)
            ready = self._poll(wait_s)
            if late and (not ready or late.passed()):
                return Silence(kind="late", why="it did not answer in time", console_tail=self._instance.console_tail())
            for fd in ready:
                if silence := self._ready(fd):
                    return silence
        return None

    def _poll(self, wait_s: float) -> list[int]:
        cancel = () if self._cancel_fd is None else (self._cancel_fd,)
        poll = polling(self.connection.fd, self._instance.pidfd, *self._instance.side_fds(), *cancel)
        pending = self.connection.link.pending()
        poll.register(self.connection.fd, select.POLLIN | (select.POLLOUT if pending else 0))
        return [fd for fd, _ in poll.poll(wait_s * 1000)]

    def _ready(self, fd: int) -> Silence | None:
        if fd == self._cancel_fd:
            return Silence(kind="cancelled", why="the caller asked for its end")
        if fd == self._instance.pidfd:
            return self._ended("it ended")
        if fd == self.connection.fd:
            return self._receive()
        self._instance.drain(fd)
        return None

    def _receive(self) -> Silence | None:
        events = self.connection.read()
        if events is None:
            return self._ended("its channel ended")
        try:
            for event in events:
                if not isinstance(event, Control):
                    continue
                if event.kind is Kind.FAILED:
                    return Silence(kind="failed", why=f"{event.body['stage']}: {event.body['message']}")
                self._take(event)
        except PeerError as exc:
            why = f"{exc.what}: {exc.why}"
            return Silence(kind="protocol", why=why, console_tail=self._instance.console_tail())
        return None

    def _take(self, event: Control) -> None:
        body = event.body
        if event.kind is Kind.HELLO:
            if body["protocol"] != PROTOCOL:
                why = f"the agent speaks protocol {body['protocol']}, and this is {PROTOCOL}"
                raise PeerError("bad HELLO frame", why)
            self.reached["hello"] = time.monotonic()
        elif event.kind is Kind.SEEDED:
            if body["nonce"] != self._nonce:
                raise PeerError("bad SEEDED frame", "it does not answer our seed")
            self.reached["seeded"] = time.monotonic()

    def _ended(self, why: str) -> Silence:
        status = wait_for_exit(self._instance)
        return Silence(kind="ended", why=why, exit_status=status, console_tail=self._instance.console_tail())


def polling(*fds: int) -> select.poll:
    """A poll object that waits until one of *fds* is readable, and reports them in this order."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return poll


def wait_for_exit(instance: Instance) -> int | None:
    """How an instance ended whose channel or process has just done so, if it says that within a moment."""
    limit = Deadline.after(_EXIT_S)
    poll = polling(instance.pidfd, *instance.side_fds())
    while instance.exit_status() is None and not limit.passed():
        for fd, _ in poll.poll(limit.left_s() * 1000):
            if fd != instance.pidfd:
                instance.drain(fd)
                if fd not in instance.side_fds():
                    poll.unregister(fd)
    return instance.exit_status()


def evidence_of(silence: Silence, cancelled_by: int | None = None) -> Evidence:
    """What a verdict on such a job goes by. cancelled_by: the signal of the caller who cancelled it."""
    from x07_sandbox.plan.outcomes import Evidence, Stage  # not on the way of a job that answers

    found = Evidence(stage=Stage.BOOT, instance_status=silence.exit_status, console_tail=silence.console_tail)
    cause: dict[str, dict[str, Any]] = {
        "late": {"boot_timeout": True},
        "protocol": {"channel_error": silence.why},
        "failed": {"setup_failure": silence.why},
        "cancelled": {"cancelled_by": cancelled_by or 0},
    }
    return replace(found, **cause.get(silence.kind, {}))
