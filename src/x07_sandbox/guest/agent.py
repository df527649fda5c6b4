"""The guest agent: PID 1 of the virtual machine, one conversation with the host, one program.

It speaks first, takes clock and entropy before anything else, receives the job and its files, has the program
started by `init` under `confine`, carries the streams, and reports. It never trusts the program: the program has
another uid, sees neither the channel nor this process, and is bounded by a control group that this process is not in.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import time
from typing import Any, Final

from x07_sandbox.channel.connection import Connection
from x07_sandbox.channel.frames import PROTOCOL, Kind, Role
from x07_sandbox.channel.link import NEXT, Control, Event, State
from x07_sandbox.guest import filters, system
from x07_sandbox.guest.audit import Audit
from x07_sandbox.guest.errors import JobError
from x07_sandbox.guest.job import TICK_S, Job, orders
from x07_sandbox.guest.place import Place
from x07_sandbox.guest.system import write_file

PORT: Final = "x07.0"

# Doors of the guest's kernel that no program here needs and many attacks went through: a user namespace gives an
# ordinary process capabilities over namespaces of its own; io_uring and bpf are large and young.
_CLOSED: Final = (
    ("user/max_user_namespaces", "0"),
    ("kernel/io_uring_disabled", "2"),
    ("kernel/unprivileged_bpf_disabled", "1"),
    ("kernel/yama/ptrace_scope", "1"),
    ("kernel/dmesg_restrict", "1"),
    ("kernel/kptr_restrict", "2"),
)
# What the kernel would otherwise do now and then, for machines that live longer: in a fresh clone each costs
# milliseconds when it comes first.
_QUIET: Final = (
    ("kernel/sched_autogroup_enabled", "0"),
    ("vm/compaction_proactiveness", "0"),
    ("vm/stat_interval", "3600"),
)


def main() -> None:
    """Serve the one conversation and end the machine."""
    write_file("/proc/self/oom_score_adj", "-1000")  # the kernel must never choose us when memory is short
    for name, value in _CLOSED:
        write_file(f"/proc/sys/{name}", value)
    for name, value in _QUIET:
        with contextlib.suppress(FileNotFoundError):
            write_file(f"/proc/sys/{name}", value)
    # The control group holds the limit and tells of it; an allocation that the kernel finds too large would only fail.
    write_file("/proc/sys/vm/overcommit_memory", "1")
    # A program is to run out of descriptors, of which a policy can give more, not of the kernel's own 128 instances.
    write_file("/proc/sys/fs/inotify/max_user_instances", "1048576")
    try:
        Agent(_open_port(PORT)).serve()
    finally:
        system.power_off()


class Agent:
    """The conversation. One loop, one poll object; everything else is called from it."""

    def __init__(self, port_fd: int) -> None:
        self.connection = Connection(port_fd, Role.GUEST)
        self.link = self.connection.link
        self.random_fd = os.open("/dev/urandom", os.O_WRONLY | os.O_CLOEXEC)
        self.machine_id = b""
        self.place: Place | None = None
        self.job: Job | None = None
        self.audit = Audit(*filters.call_numbers())

    def serve(self) -> None:
        """Speak until the host is gone."""
        self.link.send(Kind.HELLO, {"protocol": PROTOCOL})
        while self._turn():
            pass

    def _turn(self) -> bool:
        """One wait and what follows from it; False at the end."""
        poll = select.poll()
        out = select.POLLOUT if self.link.pending() else 0
        poll.register(self.connection.fd, select.POLLIN | out)
        if self.job is not None:
            self.job.register(poll)
        running = self.job is not None and self.link.state is State.RUNNING
        ready = poll.poll(TICK_S * 1000 if running else None)
        for fd, mask in ready:
            if fd != self.connection.fd:
                if self.job is not None:
                    self.job.handle(fd, mask)
                continue
            events = self.connection.read() if mask & (select.POLLIN | select.POLLHUP) else []
            if events is None:
                return False
            for event in events:
                self._guarded(event)
        if self.job is not None:
            self.job.tick()
        return self.connection.flush()

    def _guarded(self, event: Event) -> None:
        try:
            self._take(event)
        except JobError as exc:
            self._fail(exc)
        except OSError as exc:
            self._fail(JobError("prepare", exc.errno or 0, str(exc)))

    def _fail(self, problem: JobError) -> None:
        stage, number, message = problem.args
        if (self.link.state, Kind.FAILED) in NEXT:
            self.link.send(Kind.FAILED, {"stage": stage[:64], "errno": number, "message": message[:1000]})

    def _take(self, event: Event) -> None:
        if isinstance(event, Control):
            if event.kind is Kind.WARM:
                self._warm(event.body)
            elif event.kind is Kind.SEED:
                self._take_seed(event.body)
            elif event.kind is Kind.START:
                self.place = self.place or Place()
                self.job = Job(self.link, self.machine_id, event.body, self.place, self.audit, self._fail)
                self.job.begin_if_complete()
            elif event.kind is Kind.STOP and self.job is not None:
                self.job.stop()
        elif self.job is not None:
            self.job.take(event)

    def _warm(self, body: dict[str, Any]) -> None:
        """Do beforehand what every job needs; the machine is saved after the answer.

        limits, hostname, output: as they will likely be in START.
        commands: programs of the image, run as root while there is nothing hostile, so that the kernel has read them.
        """
        first = self.place is None
        if self.place is not None:  # a program of the host's own has warmed the machine: the next place
            self.job = None
            self.place.close()
        limits = body["limits"]
        self.place = place = Place(first=first, interpreter=True, preload=body["preload"])
        place.prepare(
            orders(
                limits,
                hostname=body["hostname"],
                out_writable=body["output"],
                inputs_on_disk=False,
                spare_cpu_s=place.spare_cpu_s,
            )
        )
        place.measure()
        place.group.limit(mem_bytes=max(limits["mem_bytes"], place.waiting_bytes), tasks=limits["tasks"])
        for argv in body["commands"]:
            _run_quietly(argv)
        os.sync()  # the scratch disk is saved as the host sees it
        # What is there now stays; a collection in a clone would write to every page of it, for nothing.
        gc.collect()
        gc.freeze()
        gc.disable()
        place.cpu_us_so_far()
        self.audit.settle()
        self.link.send(Kind.WARMED, {})

    def _take_seed(self, body: dict[str, Any]) -> None:
        try:
            time.clock_settime_ns(time.CLOCK_REALTIME, body["unix_ns"])
        except OSError:
            # A kernel takes no time before its own boot (EINVAL), and a host whose clock was never set has just that.
            time.clock_settime_ns(time.CLOCK_REALTIME, time.monotonic_ns() + 10**9)
        system.add_entropy(self.random_fd, body["entropy"])
        self.machine_id = body["machine_id"]
        self.link.send(Kind.SEEDED, {"nonce": body["nonce"]})


def _open_port(name: str) -> int:
    """The channel's port, found by name; waits until the host's end is there."""
    base = "/sys/class/virtio-ports"
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for port in os.listdir(base) if os.path.isdir(base) else []:
            with open(f"{base}/{port}/name", encoding="ascii") as file:
                if file.read().strip() == name:
                    return _connected(f"/dev/{port}", deadline)
        time.sleep(0.002)  # the driver probes on its own time and offers no event without udev
    raise JobError("port", 0, f"no virtio port {name}")


def _connected(path: str, deadline: float) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    while time.monotonic() < deadline:
        mask = poll.poll(1000)
        if mask and not mask[0][1] & select.POLLHUP:
            return fd
        time.sleep(0.002)  # POLLHUP stays set until the host's end is open: there is nothing to wait on
    raise JobError("port", 0, "the host never opened its end")


def _run_quietly(argv: list[str]) -> None:
    """Run a program of the image to its end, whatever that is."""
    pid = os.fork()
    if pid == 0:
        try:
            null = os.open("/dev/null", os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            os.chdir("/tmp")  # noqa: S108 - the guest's own, in its memory
            os.execve(argv[0], argv, {"PATH": "/usr/bin:/bin"})
        finally:
            os._exit(127)
    os.waitpid(pid, 0)
