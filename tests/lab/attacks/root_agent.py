# mypy: ignore-errors
"""A compromised guest: it replaces `guest/agent.py` in images that tests build; the honest agent is `guest/honest.py`.

The agent itself keeps to the protocol, so that a run starts and ends as any other. The program is root of the machine:
all capabilities, no filter, no Landlock, no process namespace of its own, every module and device available. If its
first argument is "frames", there is no relay either, and the stream to the gate is the program's.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from x07_sandbox.channel.messages import Exec
from x07_sandbox.guest import confine, environment, execution, honest, init, machine

if TYPE_CHECKING:
    from x07_sandbox.channel.messages import Message
    from x07_sandbox.channel.streams import Event
    from x07_sandbox.guest.platform import Platform

_unshare = os.unshare


class NoRelay:
    """Stands in for a `RelayProcess`."""

    def __init__(self) -> None:
        self.status_fd, self._open_fd = os.pipe2(os.O_CLOEXEC)

    def wait_admitted(self) -> None:
        """Return at once: nothing is admitted."""

    def close(self) -> None:
        """Do nothing."""


class RootEnvironment(environment.Environment):
    """An environment that starts a new interpreter instead of using the one that waits."""

    def __init__(self, platform: Platform, *, first: bool = True, network: bool = False, **_words: object) -> None:
        super().__init__(platform, first=first, network=network)


class CompromisedAgent(honest.Agent):
    """Honest, except for the relay."""

    def _take(self, event: Message | Event) -> None:
        if isinstance(event, Exec) and "frames" in event.argv and self.environment.relay is not None:
            self.environment.relay.wait_admitted()
            self.environment.relay.close()
            self.environment.relay = NoRelay()
        super()._take(event)


def _without_pid_namespace(flags: int) -> None:
    if flags != os.CLONE_NEWPID:
        _unshare(flags)


def main() -> None:
    """Serve one conversation with a program that is root."""
    os.unshare = _without_pid_namespace
    init._Init._kill_rest = lambda _self: None  # noqa: SLF001 - every process is within reach of kill(-1)
    execution.restrict_self = lambda *_words: None
    honest.Environment = RootEnvironment
    world = tuple(step for step in confine.MACHINE.world if step.name != confine.BOUNDING_SET)  # keep capabilities
    machine.Machine.confinement = confine.Steps(
        world=world, rights=(confine.MACHINE.rights[0], confine.FRESH_SIGNALS), job=confine.VIEW
    )
    platform = machine.Machine()
    try:
        CompromisedAgent(platform.open_channel(), platform).serve()
    finally:
        platform.end()
