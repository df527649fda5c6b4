"""The guest agent: one conversation with the host, one program.

It speaks first, takes clock and entropy before anything else, receives the job and its files, has `init` start the
program, carries the streams, and reports. What it runs in is its `platform`: in all but the weakest the program sees
neither the channel nor this process, which is in no control group of the program's.
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
    """Serve the one conversation, and end. Arguments: none in a machine, else those of `platform_from_args`."""
    platform: Platform
    if words := sys.argv[1:]:
        platform = platform_from_args(words)
    else:
        from x07_sandbox.guest.machine import Machine

        platform = Machine()
    try:
        Agent(platform.open_channel(), platform).serve()
    finally:
        platform.end()


def platform_from_args(words: list[str]) -> Platform:
    """What the command line says: `os FD NET_FD`, `none FD FOLDER` or `container`, with `network` where there is any.

    A last word tells whose it is, and is not used. Raises JobError.
    """
    from x07_sandbox.guest.process import Confined, Unconfined

    match words:
        case ["os", fd, net_fd, _]:
            return Confined(int(fd), int(net_fd))
        case ["none", fd, folder, _]:
            return Unconfined(int(fd), folder)
        case ["container", *network, _]:
            from x07_sandbox.guest.container import Contained

            return Contained(network=network == ["network"])
        case _:
            raise JobError("agent", 0, f"no such platform: {' '.join(words)}")


class Agent:
    """The conversation. One loop, one poll object; everything else is called from it."""

    def __init__(self, channel_fd: int, platform: Platform) -> None:
        self.platform = platform
        self.connection = Connection(channel_fd, Role.GUEST, out_fd=platform.channel_out_fd)
        self.link = self.connection.link
        self.machine_id = b""
        self.environment: Environment | None = None
        self.job: Job | None = None
        self.audit = platform.audit()

    def serve(self) -> None:
        """Speak until the host is gone."""
        self.link.send(Kind.HELLO, {"protocol": PROTOCOL})
        while self._turn():
            pass

    def _turn(self) -> bool:
        """One wait and what follows from it; False at the end."""
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

    def _fail(self, problem: JobError) -> None:
        stage, number, message = problem.args
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
        """Do beforehand what every job needs; the machine is saved after the answer.

        limits, hostname, output: as they will likely be in START. commands: programs of the image, run as root while
        there is nothing hostile, so that the kernel has read them.
        """
        first = self.environment is None
        if self.environment is not None:  # a program of the host's own has warmed the machine: the next environment
            self.job = None
            self.environment.close()
        limits = body["limits"]
        self.environment = environment = Environment(
            self.platform, first=first, interpreter=True, preload=body["preload"], network=body["network"]
        )
        environment.prepare(
            job_settings(limits, body["hostname"], environment.spare_cpu_s, out_writable=body["output"])
        )
        environment.measure()
        if environment.relay is not None:
            environment.relay.wait_built()
        environment.group.limit(mem_bytes=max(limits["mem_bytes"], environment.waiting_bytes), tasks=limits["tasks"])
        for argv in body["commands"]:
            _run_quietly(argv)
        os.sync()  # the scratch disk is saved as the host sees it
        # What is there now stays; a collection in a clone would write to every page of it, for nothing.
        gc.collect()
        gc.freeze()
        gc.disable()
        environment.cpu_us_so_far()
        self.audit.settle()
        self.link.send(Kind.WARMED, {})


def _run_quietly(argv: list[str]) -> None:
    """Run a program of the image to its end, whatever that is."""
    if pid := os.fork():
        os.waitpid(pid, 0)
        return
    try:
        null = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.chdir("/tmp")  # noqa: S108 - the guest's own, in its memory
        os.execve(argv[0], argv, {"PATH": "/usr/bin:/bin"})
    finally:
        os._exit(127)
