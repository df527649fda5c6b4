# mypy: ignore-errors
"""A compromised guest: it replaces `guest/agent.py` in images that tests build; the honest agent is `guest/honest.py`.

The agent itself keeps to the protocol, so that a run goes on and ends as any other. The program is root of the
machine: all capabilities, no filter, no Landlock, no process namespace of its own, every module and device at hand.
Where its first argument is "frames", there is no relay either, and the stream to the gate is the program's.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from x07_sandbox.channel.link import Control, Event
from x07_sandbox.guest import confine, environment, honest, init, machine, restrict

if TYPE_CHECKING:
    from x07_sandbox.guest.platform import Platform

_unshare = os.unshare
_last_steps = restrict.exec_functions


class NoRelay:
    """In the place of a `RelayProcess`."""

    def __init__(self) -> None:
        self.status_fd, self._open_fd = os.pipe2(os.O_CLOEXEC)

    def wait_built(self) -> None:
        """It is."""

    def wait_admitted(self) -> None:
        """It is."""

    def admit(self, _network: dict) -> None:
        """It needs no leave."""

    def close(self) -> None:
        """There is nothing to end."""


class RootEnvironment(environment.Environment):
    """A place whose program is started anew, without an interpreter that waits."""

    def __init__(self, platform: Platform, *, first: bool = True, network: bool = False, **_words: object) -> None:
        super().__init__(platform, first=first, network=network)


class LostAgent(honest.Agent):
    """Honest, but for the relay."""

    def _take(self, event: Event) -> None:
        if isinstance(event, Control) and event.kind is honest.Kind.START and "frames" in event.body["argv"]:
            self.environment = self.environment or RootEnvironment(
                self.platform, network=event.body["network"] is not None
            )
            if self.environment.relay is not None:
                self.environment.relay.wait_built()
                self.environment.relay.close()
                self.environment.relay = NoRelay()
        super()._take(event)


def _without_pid_namespace(flags: int) -> None:
    if flags != os.CLONE_NEWPID:
        _unshare(flags)


def _only_the_program(program: int, *, namespace: bool) -> int:
    """As init._wait_for_program, where everybody is in reach of kill(-1)."""
    del namespace
    while True:
        pid, status = os.wait()
        if pid == program:
            return status


def _no_last_steps() -> tuple:
    return (lambda *_words, **_more: None), _last_steps()[1]


def main() -> None:
    """Serve the one conversation with a program that is root."""
    os.unshare = _without_pid_namespace
    init._wait_for_program = _only_the_program  # noqa: SLF001 - there is no other way in
    restrict.exec_functions = _no_last_steps
    honest.Environment = RootEnvironment
    machine.Machine.confinement = confine.Confinement(
        world=confine.MACHINE.world, rights=(confine.MACHINE.rights[0], confine.FRESH_SIGNALS), job=confine.VIEW
    )
    platform = machine.Machine()
    try:
        LostAgent(platform.open_channel(), platform).serve()
    finally:
        platform.end()
