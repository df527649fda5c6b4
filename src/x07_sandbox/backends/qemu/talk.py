"""The conversation with an agent outside a job: until it has booted, or has prepared a place for a program."""

from __future__ import annotations

import select
from typing import TYPE_CHECKING

from x07_sandbox.channel.connection import Connection
from x07_sandbox.channel.frames import Kind, Role
from x07_sandbox.channel.link import Control, State
from x07_sandbox.errors import PeerError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from x07_sandbox.backends.base import Instance
    from x07_sandbox.host.clocks import Deadline

    Words = Mapping[State, tuple[Kind, Mapping[str, object]]]


def talk_until(
    instance: Instance, wanted: State, deadline: Deadline, *, begin: State = State.WAITING, words: Words | None = None
) -> str:
    """Keep up the conversation from the state *begin* until it is *wanted*; why that did not come about, else "".

    words: what is said when a state is reached.
    """
    connection = Connection(instance.channel_fd, Role.HOST, begin)
    while connection.link.state is not wanted:
        if words and (said := words.get(connection.link.state)):
            connection.link.send(*said)
        if not connection.flush():
            return "its channel ended"
        late = deadline.passed()  # what had come by then is taken: it may be we who are late
        if problem := _turn(instance, connection, deadline):
            return problem
        if late and connection.link.state is not wanted:
            return "it did not answer in time"
    return ""


def _turn(instance: Instance, connection: Connection, deadline: Deadline) -> str:
    poll = select.poll()
    poll.register(instance.channel_fd, select.POLLIN | (select.POLLOUT if connection.link.pending() else 0))
    for fd in (instance.pidfd, *instance.side_fds()):
        poll.register(fd, select.POLLIN)
    for fd, _ in poll.poll(deadline.left_s() * 1000 + 1):
        if fd == instance.pidfd:
            return "it ended"
        if fd != instance.channel_fd:
            instance.drain(fd)
        elif problem := _receive(connection):
            return problem
    return ""


def _receive(connection: Connection) -> str:
    events = connection.read()
    if events is None:
        return "its channel ended"
    try:
        for event in events:
            if isinstance(event, Control) and event.kind is Kind.FAILED:
                return f"{event.body['stage']}: {event.body['message']}"
    except PeerError as exc:
        return f"{exc.what}: {exc.why}"
    return ""
