"""The guest agent. It serves the session that the host opens: it runs commands and reports how they ended.

The agent runs on a `Platform`. Except with the `none` backend, the program can see neither the channel nor the agent's
process. In VMs and with the `os` backend, the agent's process is outside the program's control group.
"""

from __future__ import annotations

import gc
import os
import select
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from x07_sandbox.channel.connection import Connection
from x07_sandbox.channel.link import NEXT, State
from x07_sandbox.channel.messages import PROTOCOL, Failed, Held, Hello, Hold, Open, Resume, Seed, Seeded, Warm, Warmed
from x07_sandbox.channel.streams import Event, Role
from x07_sandbox.errors import PeerError
from x07_sandbox.guest.environment import Environment, job_settings
from x07_sandbox.guest.exec import TICK_S
from x07_sandbox.guest.sandbox import Sandbox
from x07_sandbox.guest.system import JobError

if TYPE_CHECKING:
    from x07_sandbox.channel.messages import Message
    from x07_sandbox.guest.platform import Platform


def main() -> None:
    """Serve one connection to the host, then end. See `platform_from_args` for the arguments; a VM passes none."""
    platform: Platform
    if args := sys.argv[1:]:
        platform = platform_from_args(args)
    else:
        from x07_sandbox.guest.machine import Machine

        platform = Machine()
    try:
        Agent(platform.open_channel(), platform).serve()
    finally:
        platform.end()


def platform_from_args(args: list[str]) -> Platform:
    """Return the platform for arguments `os FD`, `none FD FOLDER` or `container [network] [tasks]`. Raises JobError."""
    # A further last argument, which is not used here, marks the process's owner.
    from x07_sandbox.guest.process import Confined, Unconfined

    match args:
        case ["os", fd, _]:
            return Confined(int(fd))
        case ["none", fd, folder, _]:
            return Unconfined(int(fd), folder)
        case ["container", *words, _]:
            from x07_sandbox.guest.process import Contained

            return Contained(network="network" in words, limits_tasks="tasks" in words)
        case _:
            raise JobError("agent", 0, f"unknown platform: {' '.join(args)}")


class Agent:
    """The event loop that serves the connection to the host."""

    def __init__(self, channel_fd: int, platform: Platform) -> None:
        self.platform = platform
        self.connection = Connection(channel_fd, Role.GUEST, out_fd=platform.channel_out_fd)
        self.link = self.connection.link
        self.machine_id = b""
        self.environment: Environment | None = None
        self.sandbox: Sandbox | None = None
        self.audit = platform.audit()

    def serve(self) -> None:
        """Run until the host disconnects."""
        self.link.send(Hello(PROTOCOL))
        while self._turn():
            pass

    def _turn(self) -> bool:
        """Wait for events once and handle them. Return False when the host has disconnected."""
        poll = select.poll()
        self.connection.register(poll)
        sandbox = None if self.link.state is State.HELD else self.sandbox
        if sandbox is not None:
            sandbox.register(poll)
        running = sandbox is not None and sandbox.is_running()
        wait_s = sandbox.paused_s() if sandbox is not None else 0.0
        ready = poll.poll((wait_s or TICK_S) * 1000 if running else None)
        for fd, mask in ready:
            if fd != self.connection.fd:
                if sandbox is not None:
                    sandbox.handle(fd, mask)
            elif mask & (select.POLLIN | select.POLLHUP) and not self._receive():
                return False
            if self.link.state is State.HELD:  # nothing may be sent any more, so nothing else is handled
                break
        if self.sandbox is not None and self.link.state is not State.HELD:
            self._attempt(self.sandbox.tick)
        return self.connection.flush()

    def _receive(self) -> bool:
        """Handle what the host has sent. Return False when it has disconnected."""
        events = self.connection.read()
        try:
            for event in events or ():
                self._attempt(self._take, event)
        except PeerError:
            if self.link.state is not State.FAILED:  # else the host does not know of the failure yet
                raise
        return events is not None

    def _attempt(self, call: Callable[..., object], *args: object) -> None:
        try:
            call(*args)
        except JobError as exc:
            self._fail(exc)
        except OSError as exc:
            self._fail(JobError("prepare", exc.errno or 0, str(exc)))

    def _fail(self, error: JobError, command: int = 0) -> None:
        stage, number, message = error.args
        if (self.link.state, Failed) in NEXT:
            self.link.send(Failed(command, stage[:64], number, message[:1000]))

    def _take(self, event: Message | Event) -> None:
        sandbox = self.sandbox
        if isinstance(event, Warm):
            self._warm(event)
        elif isinstance(event, Seed):
            self.platform.seed(event)
            self.machine_id = event.machine_id
            if self.environment is not None and sandbox is not None:
                self.environment.rejoin(event)
                sandbox.rejoin()
            self.link.send(Seeded(event.nonce))
        elif isinstance(event, Open):
            if event.root:
                self._make_rooted(network=event.network is not None)
            self.environment = self.environment or Environment(self.platform, network=event.network is not None)
            self.environment.admit(event.network)
            opening = self.platform.adapt(event)
            self.sandbox = Sandbox(self.link, self.machine_id, opening, self.environment, self.audit, self._fail)
        elif isinstance(event, Hold | Resume) and self.environment is not None:
            stopped = self.environment.group.freeze(frozen=isinstance(event, Hold))
            if isinstance(event, Hold):
                self.link.send(Held(event.number, stopped))
        elif sandbox is not None:
            sandbox.take(event)

    def _make_rooted(self, *, network: bool) -> None:
        """Replace the environment by one whose programs are root."""
        self.platform.become_rooted()
        first = self.environment is None
        if self.environment is not None:
            self.environment.close()
        self.environment = Environment(self.platform, first=first, network=network)

    def _warm(self, order: Warm) -> None:
        """Prepare everything that does not depend on the job, then answer WARMED.

        The host then saves the VM, or keeps it waiting for a job.

        The commands run as root, while nothing hostile is in the guest, so that their files are in the page cache.
        """
        first = self.environment is None
        if self.environment is not None:  # the host has run a warm-up program of its own in it
            self.sandbox = None
            self.environment.close()
        limits = order.limits
        self.environment = environment = Environment(
            self.platform, first=first, preload=order.preload, network=order.network
        )
        environment.prepare(job_settings(order, limits, environment.spare_cpu_s))
        environment.measure()
        if environment.relay is not None:
            environment.relay.wait_built()
        most_bytes = max(limits.mem_bytes, environment.waiting_bytes)
        for group in (environment.group, environment.first().group):
            group.limit(mem_bytes=most_bytes, tasks=limits.tasks)
        for argv in order.commands:
            _run_quietly(argv)
        os.sync()  # the saved VM contains the scratch disk as the host sees it
        # A garbage collection in a clone would write to (and so copy) every page of these objects.
        gc.collect()
        gc.freeze()
        gc.disable()
        environment.baseline_cpu_us()
        self.audit.settle()
        self.link.send(Warmed())


def _run_quietly(argv: list[str]) -> None:
    """Run a program installed in the image without output, and ignore its exit status."""
    if pid := os.fork():
        os.waitpid(pid, 0)
        return
    try:
        null = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.chdir("/tmp")  # noqa: S108 - in the guest
        os.execve(argv[0], argv, {"PATH": "/usr/bin:/bin"})
    finally:
        os._exit(127)
