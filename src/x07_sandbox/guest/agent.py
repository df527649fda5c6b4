"""The guest agent. It receives one job from the host, runs the job's program and reports the result.

The agent runs on a `Platform`. Except with the `none` backend, the program can see neither the channel nor the agent's
process. In VMs and with the `os` backend, the agent's process is outside the program's control group.
"""

from __future__ import annotations

import gc
import os
import select
import sys
from typing import TYPE_CHECKING, Any

from x07_sandbox.channel.connection import Connection
from x07_sandbox.channel.frames import PROTOCOL, Kind, Role
from x07_sandbox.channel.link import NEXT, Control, Event, State
from x07_sandbox.guest.environment import Environment
from x07_sandbox.guest.errors import JobError
from x07_sandbox.guest.job import TICK_S, Job, job_settings

if TYPE_CHECKING:
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
    """Return the platform for arguments `os FD NET_FD`, `none FD FOLDER` or `container [network]`. Raises JobError."""
    # A further last argument, which is not used here, marks the process's owner.
    from x07_sandbox.guest.process import Confined, Unconfined

    match args:
        case ["os", fd, net_fd, _]:
            return Confined(int(fd), int(net_fd))
        case ["none", fd, folder, _]:
            return Unconfined(int(fd), folder)
        case ["container", *network, _]:
            from x07_sandbox.guest.container import Contained

            return Contained(network=network == ["network"])
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
        self.job: Job | None = None
        self.audit = platform.audit()

    def serve(self) -> None:
        """Run until the host disconnects."""
        self.link.send(Kind.HELLO, {"protocol": PROTOCOL})
        while self._turn():
            pass

    def _turn(self) -> bool:
        """Wait for events once and handle them. Return False when the host has disconnected."""
        poll = select.poll()
        self.connection.register(poll)
        if self.job is not None:
            self.job.register(poll)
        running = self.job is not None and self.link.state is State.RUNNING
        wait_s = self.job.paused_s() if running and self.job is not None else 0.0
        ready = poll.poll((wait_s or TICK_S) * 1000 if running else None)
        for fd, mask in ready:
            if fd != self.connection.fd:
                if self.job is not None:
                    self.job.handle(fd, mask)
                continue
            events = self.connection.read() if mask & (select.POLLIN | select.POLLHUP) else []
            if events is None:
                return False
            for event in events:
                try:
                    self._take(event)
                except JobError as exc:
                    self._fail(exc)
                except OSError as exc:
                    self._fail(JobError("prepare", exc.errno or 0, str(exc)))
        if self.job is not None:
            self.job.tick()
        return self.connection.flush()

    def _fail(self, error: JobError) -> None:
        stage, number, message = error.args
        if (self.link.state, Kind.FAILED) in NEXT:
            self.link.send(Kind.FAILED, {"stage": stage[:64], "errno": number, "message": message[:1000]})

    def _take(self, event: Event) -> None:
        if isinstance(event, Control):
            if event.kind is Kind.WARM:
                self._warm(event.body)
            elif event.kind is Kind.SEED:
                self.platform.seed(event.body)
                self.machine_id = event.body["machine_id"]
                self.link.send(Kind.SEEDED, {"nonce": event.body["nonce"]})
            elif event.kind is Kind.START:
                network = event.body["network"]
                self.environment = self.environment or Environment(self.platform, network=network is not None)
                self.environment.admit(network)
                body = self.platform.adapt(event.body)
                self.job = Job(self.link, self.machine_id, body, self.environment, self.audit, self._fail)
                self.job.begin_if_complete()
            elif event.kind is Kind.STOP and self.job is not None:
                self.job.stop()
        elif self.job is not None:
            self.job.take(event)

    def _warm(self, body: dict[str, Any]) -> None:
        """Prepare everything that does not depend on the job, then answer the host, which saves the VM after that.

        limits, hostname, output: the values that START will probably have. commands: programs installed in the image.
        They run as root, while nothing hostile is in the guest, so that their files are in the page cache.
        """
        first = self.environment is None
        if self.environment is not None:  # a warm-up program of the host's own has run in it
            self.job = None
            self.environment.close()
        limits = body["limits"]
        self.environment = environment = Environment(
            self.platform, first=first, preload=body["preload"], network=body["network"]
        )
        spare_cpu_s = environment.spare_cpu_s
        environment.prepare(job_settings(limits, body["hostname"], spare_cpu_s, out_writable=body["output"]))
        environment.measure()
        if environment.relay is not None:
            environment.relay.wait_built()
        environment.group.limit(mem_bytes=max(limits["mem_bytes"], environment.waiting_bytes), tasks=limits["tasks"])
        for argv in body["commands"]:
            _run_quietly(argv)
        os.sync()  # the snapshot contains the scratch disk as the host sees it
        # A garbage collection in a clone would write to (and so copy) every page of these objects.
        gc.collect()
        gc.freeze()
        gc.disable()
        environment.baseline_cpu_us()
        self.audit.settle()
        self.link.send(Kind.WARMED, {})


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
