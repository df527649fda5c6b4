"""The guest agent: PID 1 of the virtual machine, one conversation with the host, one program.

It speaks first, takes clock and entropy before anything else, receives the job and its files, has the program
started by `init` under `confine`, carries the streams, and reports. It never trusts the program: the program has
another uid, sees neither the channel nor this process, and is bounded by a control group that this process is not in.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import stat
import struct
import time
from typing import Any, BinaryIO, Final

from x07_sandbox.channel.connection import Connection
from x07_sandbox.channel.frames import PROTOCOL, Kind, Role, Stream
from x07_sandbox.channel.link import Control, Data, Eof, Event, State
from x07_sandbox.guest import confine, init, system
from x07_sandbox.guest.cgroup import ProgramGroup
from x07_sandbox.guest.unpack import ArchiveError, unpack

PORT: Final = "x07.0"
SCRATCH_SERIAL: Final = "x07scratch"
_READ: Final = 32 * 1024
_TICK_MS: Final = 100  # how often the CPU counter is read while the program runs
_UNPACKED_MAX: Final = 4 << 30
_FULL_BLOCKS: Final = 256  # of 4 KiB: a disk with less left counts as full


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


class JobError(Exception):
    """The job cannot be carried out: stage, errno, message; told to the host as FAILED."""


def main() -> None:
    """Serve the one conversation and end the machine."""
    _write("/proc/self/oom_score_adj", "-1000")  # the kernel must never choose us when memory is short
    for name in _CLOSED:
        _write(f"/proc/sys/{name[0]}", name[1])
    try:
        Agent(_open_port(PORT)).serve()
    finally:
        system.power_off()


class Agent:
    """The conversation. One loop, one poll object; everything else is called from it."""

    def __init__(self, port_fd: int) -> None:
        self.connection = Connection(port_fd, Role.GUEST)
        self.link = self.connection.link
        self.seed: dict[str, Any] = {}
        self.job: Job | None = None

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
        ready = poll.poll(_TICK_MS if running else None)
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
            self._fail(str(exc.args[0]), int(exc.args[1]), str(exc.args[2]))
        except OSError as exc:
            self._fail("prepare", exc.errno or 0, str(exc))

    def _fail(self, stage: str, number: int, message: str) -> None:
        if self.link.state in {State.SEEDING, State.PREPARING, State.RUNNING, State.COLLECTING}:
            self.link.send(Kind.FAILED, {"stage": stage[:64], "errno": number, "message": message[:1000]})

    def _take(self, event: Event) -> None:
        if isinstance(event, Control):
            if event.kind is Kind.SEED:
                self._take_seed(event.body)
            elif event.kind is Kind.START:
                self.job = Job(self, event.body)
                self.job.begin_if_complete()
            elif event.kind is Kind.STOP and self.job is not None:
                self.job.stop()
        elif self.job is not None:
            self.job.take(event)

    def _take_seed(self, body: dict[str, Any]) -> None:
        time.clock_settime_ns(time.CLOCK_REALTIME, body["unix_ns"])
        system.add_entropy(bytes.fromhex(body["entropy"]))
        socket.sethostname(body["hostname"])
        self.seed = body
        self.link.send(Kind.SEEDED, {"nonce": body["nonce"]})


class Job:
    """One program: its files, its limits, its streams, its end."""

    def __init__(self, agent: Agent, body: dict[str, Any]) -> None:
        self.agent = agent
        self.link = agent.link
        self.argv: list[str] = body["argv"]
        self.env: dict[str, str] = body["env"]
        self.cwd: str = body["cwd"]
        self.limits: dict[str, int] = body["limits"]
        self.output: dict[str, Any] | None = body["output"]
        _mount_scratch()
        self.files = IncomingFiles(body["files"])
        self.group: ProgramGroup | None = None
        self.fds: dict[int, int] = {}  # our ends of the program's output -> stream
        self.stdin_fd = -1
        self.report_fd = -1
        self.report = b""
        self.held = bytearray()  # input that the program has not read yet: at most one window
        self.input_ended = False
        self.cpu_exceeded = False
        self.stopped = False
        self.wait_status: int | None = None
        self.output_file: BinaryIO | None = None

    # before the program

    def take(self, event: Event) -> None:
        """A data event from the host."""
        if isinstance(event, Data) and event.stream == Stream.STDIN:
            self.held += event.payload
            self._feed()
        elif isinstance(event, Eof) and event.stream == Stream.STDIN:
            self.input_ended = True
            self._feed()
        elif isinstance(event, Data):
            self.files.write(event.stream, event.payload)
            self.link.consumed(event.stream, len(event.payload))
        elif isinstance(event, Eof):
            self.files.close(event.stream)
            self.begin_if_complete()

    def begin_if_complete(self) -> None:
        """Start the program once all files have come."""
        if self.group is None and self.files.complete():
            self._start()

    def _start(self) -> None:
        limits = self.limits
        self.group = ProgramGroup(mem_bytes=limits["mem_bytes"], tasks=limits["tasks"])
        stdin_r, self.stdin_fd = os.pipe2(os.O_CLOEXEC)
        stdout_r, stdout_w = os.pipe2(os.O_CLOEXEC)
        stderr_r, stderr_w = os.pipe2(os.O_CLOEXEC)
        self.report_fd, report_w = os.pipe2(os.O_CLOEXEC)
        confinement = confine.Confinement(
            netns_fd=_network_namespace(),
            procs_fd=self.group.open_procs(),
            hostname=self.agent.seed["hostname"],
            machine_id=self.agent.seed["machine_id"],
            tmp_bytes=limits["tmp_bytes"],
            fds=limits["fds"],
            cpu_s=limits["cpu_ms"] // 1000 + 5,
            core_bytes=limits["core_bytes"],
            out_writable=self.output is not None,
        )
        os.unshare(os.CLONE_NEWPID)  # for the next child only: it becomes PID 1 of the program's namespace
        if os.fork() == 0:
            init.run_init(confinement, self.argv, self.env, self.cwd, (stdin_r, stdout_w, stderr_w), report_w)
        for fd in (stdin_r, stdout_w, stderr_w, report_w, confinement.netns_fd, confinement.procs_fd):
            os.close(fd)
        self.fds = {stdout_r: Stream.STDOUT, stderr_r: Stream.STDERR}
        for fd in (stdout_r, stderr_r, self.stdin_fd, self.report_fd):
            os.set_blocking(fd, False)
        self._feed()

    # while it runs

    def register(self, poll: select.poll) -> None:
        """Name the descriptors to wait for."""
        if self.report_fd >= 0:
            poll.register(self.report_fd, select.POLLIN)
        if self.link.state is State.RUNNING:
            # A reader on the host who stalls lets the window run out: then the program waits, and nobody else.
            for fd, stream in self.fds.items():
                if self.link.window(stream):
                    poll.register(fd, select.POLLIN)
        if self.stdin_fd >= 0 and self.held:
            poll.register(self.stdin_fd, select.POLLOUT)

    def handle(self, fd: int, mask: int) -> None:
        """One of those descriptors is ready."""
        if fd == self.report_fd:
            self._take_report()
        elif fd in self.fds:
            # In one turn init may have ended without a report: after FAILED nothing more of the program is carried.
            if self.link.state is State.RUNNING:
                self._carry(fd)
        elif fd == self.stdin_fd:
            self._feed(broken=bool(mask & select.POLLERR))

    def _carry(self, fd: int) -> None:
        stream = self.fds[fd]
        try:
            data = os.read(fd, min(_READ, self.link.window(stream)))
        except BlockingIOError:
            return
        if data:
            self.link.send_data(stream, data)
        else:
            self.link.end_stream(stream)
            os.close(fd)
            del self.fds[fd]

    def _feed(self, *, broken: bool = False) -> None:
        """Give the program what has come for it; where it reads no more, take and drop the rest."""
        if self.group is None:
            return
        while self.held and self.stdin_fd >= 0 and not broken:
            try:
                count = os.write(self.stdin_fd, self.held[:_READ])
            except BlockingIOError:
                return
            except BrokenPipeError:
                broken = True
            else:
                del self.held[:count]
                self.link.consumed(Stream.STDIN, count)
        if (broken or self.input_ended) and self.stdin_fd >= 0:
            os.close(self.stdin_fd)
            self.stdin_fd = -1
        if self.stdin_fd < 0 and self.held:
            self.link.consumed(Stream.STDIN, len(self.held))
            self.held.clear()

    def _take_report(self) -> None:
        data = os.read(self.report_fd, 8192)
        if data:
            self.report += data
            if self.report.startswith(init.STARTED) and self.link.state is State.PREPARING:
                self.link.send(Kind.STARTED, {})
                self.report = self.report[1:]
            return
        # Init is gone, and with it, by the kernel's hand, every process of its namespace.
        os.close(self.report_fd)
        self.report_fd = -1
        with contextlib.suppress(ChildProcessError):
            os.wait()
        if self.report.startswith(init.EXITED) and len(self.report) == init.EXITED_SIZE:
            self.wait_status = struct.unpack(">I", self.report[1:])[0]
        elif self.report.startswith(init.FAILED):
            failure = json.loads(self.report[1:])
            raise_ = JobError(failure["stage"], failure["errno"], failure["message"])
            self.agent._fail(*raise_.args)  # noqa: SLF001 - the job is the agent's own
        else:
            self.agent._fail("init", 0, "the program's init ended without a report")  # noqa: SLF001

    def tick(self) -> None:
        """Whatever time or the last events have made due."""
        if self.group is None or self.link.state is State.FAILED:
            return
        running = self.link.state is State.RUNNING and self.wait_status is None
        if running and not self.cpu_exceeded and self.group.cpu_us() > self.limits["cpu_ms"] * 1000:
            self.cpu_exceeded = True
            self.group.kill()
        if self.link.state is State.RUNNING and self.wait_status is not None and not self.fds:
            self._exited()
        if self.link.state is State.COLLECTING and self.output_file is not None:
            self._send_output()

    def stop(self) -> None:
        """The host asks for the end: note what the program was doing, then kill it."""
        if self.group is not None and self.wait_status is None:
            self.stopped = self.group.any_stopped()
            self.group.kill()

    # after it

    def _exited(self) -> None:
        group = self.group
        assert group is not None and self.wait_status is not None  # noqa: S101, PT018 - for the type checker
        size, problem = self._open_output()
        self.link.send(
            Kind.EXITED,
            {
                "wait_status": self.wait_status,
                "cpu_us": group.cpu_us(),
                "memory_peak_bytes": group.memory_peak_bytes(),
                "oom_kills": group.oom_kills(),
                "tasks_peak": group.tasks_peak(),
                "tasks_refused": group.tasks_refused(),
                "cpu_exceeded": self.cpu_exceeded,
                "stopped": self.stopped,
                "disk_full": os.statvfs(confine.SCRATCH).f_bavail < _FULL_BLOCKS,
                "output_bytes": size,
                "output_problem": problem,
            },
        )

    def _open_output(self) -> tuple[int | None, str | None]:
        """Open the one file that the host wants: its size, or what is wrong with it."""
        if self.output is None:
            return None, None
        path = f"{confine.SCRATCH}/out/{os.path.basename(self.output['path'])}"
        try:
            # O_NONBLOCK: a fifo in its place must not hold us.
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as exc:
            return None, f"cannot be opened: {exc.strerror}"
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
            os.close(fd)
            return None, "is no regular file of its own"
        if info.st_size > self.output["max_bytes"]:
            os.close(fd)
            return None, f"has {info.st_size} bytes, over the limit of {self.output['max_bytes']}"
        self.output_file = os.fdopen(fd, "rb", buffering=0)
        return info.st_size, None

    def _send_output(self) -> None:
        assert self.output_file is not None  # noqa: S101 - for the type checker
        while (window := self.link.window(Stream.OUTPUT_FILE)) and self.link.pending() < 4 * _READ:
            data = self.output_file.read(min(window, _READ))
            if not data:
                self.link.end_stream(Stream.OUTPUT_FILE)
                self.output_file.close()
                self.output_file = None
                return
            self.link.send_data(Stream.OUTPUT_FILE, data)


class IncomingFiles:
    """The files of START, written as they come; an archive is unpacked when it is whole."""

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        self.entries = {Stream.FIRST_FILE + index: entry for index, entry in enumerate(entries)}
        self.open: dict[int, BinaryIO] = {}
        for stream, entry in self.entries.items():
            self.open[stream] = open(self._path(stream, entry), "xb")  # noqa: SIM115 - closed at its end of stream

    def _path(self, stream: int, entry: dict[str, Any]) -> str:
        if entry["kind"] == "archive":
            return f"{confine.SCRATCH}/{stream}.cpio"
        name = entry["path"].removeprefix("/x07/in/")
        if not name or "/" in name or name.startswith("."):
            raise JobError("files", 0, f"no such place: {entry['path']}")
        return f"{confine.SCRATCH}/in/{name}"

    def write(self, stream: int, data: bytes) -> None:
        """Append to the file of *stream*."""
        if stream not in self.open:
            raise JobError("files", 0, f"stream {stream} is not in the job")
        self.open[stream].write(data)

    def close(self, stream: int) -> None:
        """The file is whole: close it, unpack it if it is an archive."""
        file = self.open.pop(stream, None)
        if file is None:
            raise JobError("files", 0, f"stream {stream} is not in the job, or has ended")
        file.close()
        entry = self.entries[stream]
        if entry["kind"] != "archive":
            os.chmod(file.name, entry["mode"])
            return
        target = f"{confine.SCRATCH}/in/{entry['path'].removeprefix('/x07/in/')}"
        os.mkdir(target, 0o755)
        try:
            with open(file.name, "rb") as archive:
                unpack(archive, target, most_bytes=_UNPACKED_MAX)
        except ArchiveError as exc:
            raise JobError("unpack", 0, str(exc)) from exc
        os.unlink(file.name)

    def complete(self) -> bool:
        """Whether all files have come."""
        return not self.open


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


def _mount_scratch() -> None:
    device = _disk(SCRATCH_SERIAL)
    os.makedirs(confine.SCRATCH, mode=0o755, exist_ok=True)
    system.mount(
        device, confine.SCRATCH, "ext4", system.MS_NOATIME | system.MS_NODEV | system.MS_NOSUID, "noinit_itable"
    )
    for name, owner in (("in", 0), ("out", confine.UID), ("work", confine.UID)):
        os.mkdir(f"{confine.SCRATCH}/{name}", 0o755)
        os.chown(f"{confine.SCRATCH}/{name}", owner, owner)


def _disk(serial: str) -> str:
    for name in os.listdir("/sys/block"):
        with contextlib.suppress(OSError), open(f"/sys/block/{name}/serial", encoding="ascii") as file:
            if file.read().strip("\0\n ") == serial:
                return f"/dev/{name}"
    raise JobError("scratch", 0, f"no disk {serial}")


def _network_namespace() -> int:
    """A new network namespace with only `lo`, held by its descriptor."""
    own = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.unshare(os.CLONE_NEWNET)
        system.loopback_up()
        return os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.setns(own, os.CLONE_NEWNET)
        os.close(own)


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
