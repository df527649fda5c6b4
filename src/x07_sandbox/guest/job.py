"""One job: the program's files, limits and streams, and how the program ends."""

from __future__ import annotations

import errno
import os
import select
import stat
import struct
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from x07_sandbox.channel.frames import Kind, Stream
from x07_sandbox.channel.link import Data, Eof, Event, Link, State
from x07_sandbox.channel.trees import Entry
from x07_sandbox.channel.trees import Kind as Record
from x07_sandbox.guest import confine, init
from x07_sandbox.guest.environment import Environment, Limits, exec_failure, failure
from x07_sandbox.guest.errors import JobError
from x07_sandbox.guest.execution import ExecutionRules
from x07_sandbox.guest.files import SYSTEM_CA, IncomingFiles
from x07_sandbox.guest.mounts import ProgramPaths
from x07_sandbox.guest.trees import Room, changes, left_files, stream_of

if TYPE_CHECKING:
    from x07_sandbox.guest.audit import Audit, NoAudit

_READ: Final = 32 * 1024
_PROJECT: Final = "/x07/in/project"
_OUT: Final = "/x07/out"
_FULL_BLOCKS: Final = 256  # a disk with fewer free blocks (4 KiB) counts as full
_FULL_SHARE: Final = 64  # a tmpfs with less than 1/64 free counts as full
TICK_S: Final = 0.1  # interval of CPU limit checks
# After _SHORT_READS short reads in a row without input in between, pause reading, so that a program that writes line by
# line is not interrupted for every line.
_SHORT: Final = 2048
_SHORT_READS: Final = 4
_PAUSE_S: Final = 0.005
_STALL_S: Final = 0.5  # a check that is later than this means that the host has paused the machine


def job_settings(
    limits: dict[str, int],
    hostname: str,
    spare_cpu_s: int,
    *,
    out_writable: bool,
    inputs_on_disk: bool = False,
    execution: tuple[Any, ...] | None = None,
) -> confine.JobSettings:
    """Return init's settings for a job with these limits. spare_cpu_s: CPU time used before the job, in seconds."""
    cpu_s = limits["cpu_ms"] // 1000 + spare_cpu_s
    tmp_bytes, fds, core_bytes, tasks = limits["tmp_bytes"], limits["fds"], limits["core_bytes"], limits["tasks"]
    return confine.JobSettings(
        hostname, tmp_bytes, out_writable, inputs_on_disk, fds, cpu_s, core_bytes, tasks, execution
    )


class Job:
    """The job that one START frame requests."""

    def __init__(
        self,
        link: Link,
        machine_id: bytes,
        body: dict[str, Any],
        environment: Environment,
        audit: Audit | NoAudit,
        fail: Callable[[JobError], None],
    ) -> None:
        self.link = link
        self.audit = audit
        self.machine_id = machine_id
        self.environment = environment
        self.group = environment.group
        self.fail = fail
        self.argv: list[str] = body["argv"]
        self.env: dict[str, str] = body["env"]
        self.cwd: str = body["cwd"]
        self.limits: dict[str, int] = body["limits"]
        self.hostname: str = body["hostname"]
        self.output: dict[str, Any] | None = body["output"]
        self.mounts: list[dict[str, Any]] = body["mounts"]
        self.left: dict[str, int] | None = body["left"]
        self.room: dict[str, int] | None = body["room"]
        self.confined = Limits(**body["confine"])
        self.files = IncomingFiles(body["files"], environment)
        self.started = False
        self.fds: dict[int, int] = {}  # stream by our end of its pipe
        self.stdin_fd = environment.stdin_fd
        self.report_fd = self.status_fd = -1
        self.status = b""
        self.read_at = self.paused_until = 0.0  # for output
        self.short_reads = 0
        self.held = bytearray()  # input not yet written to the program; at most one window
        self.input_ended = False
        self.cpu_before_us = self.cpu_seen_us = 0
        self.cpu_checked_at = 0.0
        self.cpu_exceeded = self.stopped = False
        self.wait_status: int | None = None
        self.output_file: BinaryIO | None = None
        self.trees: list[tuple[Stream, Iterator[bytes]]] = []  # to be sent
        self.trees_held = b""

    # before the program

    def take(self, event: Event) -> None:
        """Handle a data event from the host."""
        if isinstance(event, (Data, Eof)) and event.stream == Stream.STDIN:
            self.short_reads = 0
            self.held += event.payload if isinstance(event, Data) else b""
            self.input_ended |= isinstance(event, Eof)
            self._feed()
        elif isinstance(event, Data):
            self.files.write(event.stream, event.payload)
            self.link.consumed(event.stream, len(event.payload))
        elif isinstance(event, Eof):
            self.files.close(event.stream)
            self.begin_if_complete()

    def begin_if_complete(self) -> None:
        """Start the program once all files have arrived."""
        if not self.started and self.files.complete():
            self._start()

    def _start(self) -> None:
        limits, environment = self.limits, self.environment
        # The waiting process may be larger than a small limit, which is applied once it has become the program.
        self.group.limit(mem_bytes=max(limits["mem_bytes"], environment.waiting_bytes), tasks=limits["tasks"])
        if self.mounts or self.files.ca:
            environment.prepare(self._settings())
            self._mount()
        self._find_command()
        environment.prepare(self._settings(self._execution()))
        for tree in self.files.trees.values():
            tree.wait()
        environment.name(self.machine_id)
        self.cpu_before_us = environment.baseline_cpu_us()
        self.cpu_checked_at = time.monotonic()
        self.started = True
        names = ProgramPaths(self.files.trees, self.mounts, f"/proc/{environment.init}/root")
        self.audit.begin(names.path if self.mounts else None, names.roots(), names.link_target)
        environment.start(self.argv, self.env, self.cwd, self.confined)
        self.report_fd, self.status_fd = environment.report_fd, environment.status_fd
        self.fds = {environment.stdout_fd: Stream.STDOUT, environment.stderr_fd: Stream.STDERR}
        for fd in (*self.fds, self.stdin_fd):
            os.set_blocking(fd, False)
        self._feed()

    def _settings(self, execution: ExecutionRules | None = None) -> confine.JobSettings:
        return job_settings(
            self.limits,
            self.hostname,
            self.environment.spare_cpu_s,
            out_writable=self.output is not None or self._collects(),
            inputs_on_disk=self.files.on_disk,
            execution=None if execution is None else tuple(execution),
        )

    def _execution(self) -> ExecutionRules | None:
        """Return the execution rules, or None if everything may be executed."""
        confined = self.confined
        if confined.execute and confined.programs is None:
            return None
        return ExecutionRules(
            programs=confined.programs,
            prefixes=confined.prefixes,
            program=None if self.environment.becomes(self.argv, self.env, confined) else self.argv[0],
            alone=confined.alone,
            mounts=[mount["at"] for mount in self.mounts],
        )

    def _collects(self) -> bool:
        return self.left is not None and self.left["files"] > 0

    def _find_command(self) -> None:
        """Look up a command without a slash in PATH. Raises JobError."""
        name = self.argv[0]
        if "/" in name:
            return
        view = f"/proc/{self.environment.init}/root" if self.environment.platform.namespaces else ""
        for folder in self.env.get("PATH", "").split(":"):
            path = f"{folder}/{name}"
            if path.startswith("/") and os.path.isfile(view + path) and os.access(view + path, os.X_OK):
                self.argv = [path, *self.argv[1:]]
                return
        raise JobError("exec", errno.ENOENT, f"command not found: {name}")

    def _mount(self) -> None:
        if any(mount["at"].startswith(_PROJECT) for mount in self.mounts):
            os.makedirs(f"{self.environment.folder(on_disk=self.files.on_disk)}/project", exist_ok=True)
        mounts = [(self._source(mount), mount["at"], mount["write"]) for mount in self.mounts]
        mounts += [(self.files.ca, SYSTEM_CA, False)] if self.files.ca else []
        self.environment.platform.mount(self.environment.init, mounts)
        self.environment.mounted()

    def _source(self, mount: dict[str, Any]) -> str:
        """Return the path of a mount's source as the agent sees it."""
        if mount["tree"] is None:
            return self.environment.platform.folder("work")
        folder = os.fsdecode(self.files.trees[mount["tree"]].folder)
        return f"{folder}/{mount['sub']}" if mount["sub"] else folder

    # while it runs

    def register(self, poll: select.poll) -> None:
        """Register the descriptors to wait for."""
        for fd in (self.report_fd, self.status_fd, self._relay_fd()):
            if fd >= 0:
                poll.register(fd, select.POLLIN)
        if self.link.state is State.RUNNING:
            poll.register(self.audit.fd, select.POLLIN)
            # Without window, because the host's reader stalls, only the program blocks.
            for fd, stream in self.fds.items() if not self.paused_s() else ():
                if self.link.window(stream):
                    poll.register(fd, select.POLLIN)
        if self.stdin_fd >= 0 and self.held:
            poll.register(self.stdin_fd, select.POLLOUT)

    def paused_s(self) -> float:
        """Return for how many seconds the agent must not read output."""
        if self.short_reads < _SHORT_READS or self.wait_status is not None:
            return 0.0
        return max(0.0, self.paused_until - time.monotonic())

    def _relay_fd(self) -> int:
        """Return the descriptor that signals the relay's end, or -1 if there is no need to wait for that now."""
        relay = self.environment.relay
        return relay.status_fd if relay is not None and self.started and self.link.state is State.RUNNING else -1

    def handle(self, fd: int, mask: int) -> None:
        """Handle a ready descriptor."""
        if fd == self.report_fd:
            self._take_report()
        elif fd == self.status_fd:
            self._take_status()
        elif fd == self.audit.fd:
            self.audit.take()
        elif fd == self._relay_fd():
            assert self.environment.relay is not None  # noqa: S101 - for the type checker
            self.fail(JobError("relay", 0, self.environment.relay.end_reason()))
        elif fd in self.fds:
            # Init may have failed in this same turn.
            if self.link.state is State.RUNNING:
                self._carry(fd)
        elif fd == self.stdin_fd:
            self._feed(broken=bool(mask & select.POLLERR))

    def _carry(self, fd: int) -> None:
        try:
            data = os.read(fd, min(_READ, self.link.window(self.fds[fd])))
        except BlockingIOError:
            return
        if data:
            self.link.send_data(self.fds[fd], data)
            self._count_read(len(data))
        else:
            self._end_output(fd)

    def _count_read(self, size: int) -> None:
        now = time.monotonic()
        most = _SHORT if self.short_reads < _SHORT_READS else _READ // 2
        in_row = size < most and now - self.read_at < 3 * _PAUSE_S
        self.short_reads = self.short_reads + 1 if in_row else 0
        self.read_at, self.paused_until = now, now + _PAUSE_S

    def _feed(self, *, broken: bool = False) -> None:
        """Write buffered input to the program's standard input. Discard the input if the program has closed that."""
        if not self.started:
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

    def _take_status(self) -> None:
        """Read the status pipe. If the pipe ends without a message, the program was executed."""
        if data := os.read(self.status_fd, 8192):
            self.status += data
            return
        os.close(self.status_fd)
        self.status_fd = -1
        if self.status:
            self.fail(exec_failure(self.status))
        elif self.link.state is State.PREPARING:
            if self.limits["mem_bytes"] < self.environment.waiting_bytes:
                self.group.limit(mem_bytes=self.limits["mem_bytes"], tasks=self.limits["tasks"])
            self.link.send(Kind.STARTED, {})

    def _take_report(self) -> None:
        report = os.read(self.report_fd, 8192)
        os.close(self.report_fd)
        self.report_fd = -1
        if report.startswith(init.EXITED) and len(report) == init.EXITED_SIZE:
            # All other processes of the namespace have ended too.
            self.wait_status = struct.unpack(">I", report[1:])[0]
        else:
            self.fail(failure(report))

    def tick(self) -> None:
        """Do whatever is due after events, or because time has passed."""
        if not self.started or self.link.state is State.FAILED:
            return
        if self.link.state is State.RUNNING and self.wait_status is None and not self.cpu_exceeded:
            self._check_cpu()
        if self.link.state is State.RUNNING and self.wait_status is not None:
            self._end_streams()
            if not self.fds:
                self._exited()
        if self.link.state is State.COLLECTING:
            if self.output_file is not None:
                self._send_output(self.output_file)
            if self.trees and self.output_file is None:
                self._send_trees()

    def _end_streams(self) -> None:
        """Close empty output pipes after the last process. A descriptor sent over a socket could keep them open."""
        for fd in list(self.fds):
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            if not poll.poll(0):
                self._end_output(fd)

    def _end_output(self, fd: int) -> None:
        self.link.end_stream(self.fds.pop(fd))
        os.close(fd)

    def stop(self) -> None:
        """Kill the program at the host's request. Record whether a signal had stopped the program before."""
        if self.started and self.wait_status is None:
            self.stopped = self.group.program_stopped(self.environment.init)
            self.group.kill(self.environment.init)

    def _check_cpu(self) -> None:
        now = time.monotonic()
        late_s = now - self.cpu_checked_at - TICK_S
        if late_s < 0:
            return
        self.cpu_checked_at = now
        used_us = self._cpu_us()
        if late_s > _STALL_S:
            # The agent has priority over the program (cpu.weight), so the whole machine was paused, and the guest's
            # kernel has charged that time to the program.
            stall_us = min(int(late_s * 1_000_000), used_us - self.cpu_seen_us)
            self.cpu_before_us += stall_us
            used_us -= stall_us
        self.cpu_seen_us = used_us
        if used_us > self.limits["cpu_ms"] * 1000:
            self.cpu_exceeded = True
            self.group.kill(self.environment.init)

    def _cpu_us(self) -> int:
        return self.group.cpu_us(self.environment.init) - self.cpu_before_us

    # after the program

    def _exited(self) -> None:
        group = self.group
        size, problem = self._open_output()
        refused, lost = self.audit.end()
        for refusal, count in refused.items():
            self.link.send(Kind.DENIED, {**refusal._asdict(), "count": count})
        if any(mount["changes"] for mount in self.mounts):
            self.trees.append((Stream.CHANGES, self._changes()))
        left_count, left_size = self._count_left_files()
        self.link.send(
            Kind.EXITED,
            {
                "wait_status": self.wait_status,
                "cpu_us": self._cpu_us(),
                "memory_peak_bytes": group.count("memory_peak_bytes"),
                "oom_kills": group.count("oom_kills"),
                "tasks_peak": group.count("tasks_peak"),
                "tasks_refused": group.count("tasks_refused"),
                "cpu_exceeded": self.cpu_exceeded,
                "stopped": self.stopped,
                "disk_full": os.statvfs(self.environment.platform.scratch).f_bavail < _FULL_BLOCKS,
                "memory_full": self._memory_full(),
                "denials_lost": lost,
                "left_files": left_count,
                "left_bytes": left_size,
                "output_bytes": size,
                "output_problem": problem,
            },
        )

    def _count_left_files(self) -> tuple[int, int]:
        """Return number and size of the files that the program left in private folders. Queue those the host wants."""
        if self.left is None:
            return 0, 0
        # On some platforms, host folders lie inside these; their files are among the changes.
        places = [mount["at"] for mount in self.mounts]
        with_out = self._collects() and _OUT not in places
        folders = [self.environment.platform.folder(name) for name in ("work", "out")[: 1 + with_out]]
        start = f"{next((mount['at'] for mount in self.mounts if mount['tree'] is None), confine.CWD)}/"
        roots = [os.fsencode(at.removeprefix(start)) for at in places if at.startswith(start)]
        with self.environment.platform.reading():
            left = left_files(folders, self.files.work, self.left["files"], self.left["bytes"], roots)
        if left.files and self._collects():
            self.trees.append((Stream.LEFT_FILES, stream_of(left)))
        return left.files, min(left.size, 2**62)

    def _memory_full(self) -> bool:
        """Return whether one of the program's tmpfs folders has run out of space or inodes."""
        for fd in self.environment.in_memory_fds:
            room = os.statvfs(fd)
            if room.f_bavail * _FULL_SHARE < room.f_blocks or not room.f_favail:
                return True
        return False

    def _open_output(self) -> tuple[int | None, str | None]:
        """Open the output file. Return its size, or the reason why it cannot be sent."""
        if self.output is None:
            return None, None
        path = f"{self.environment.platform.folder('out')}/{os.path.basename(self.output['path'])}"
        try:
            with self.environment.platform.reading():
                # O_NONBLOCK: a FIFO in its place must not block.
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as exc:
            link = exc.errno == errno.ELOOP  # from O_NOFOLLOW
            return None, "is a symbolic link" if link else f"cannot be opened: {exc.strerror}"
        info = os.fstat(fd)
        problem = None
        if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
            problem = "is not a regular file with a single link"
        elif info.st_size > self.output["max_bytes"]:
            problem = f"has {info.st_size} bytes, over the limit of {self.output['max_bytes']}"
        if problem:
            os.close(fd)
            return None, problem
        self.output_file = os.fdopen(fd, "rb", buffering=0)
        return info.st_size, None

    def _send_output(self, file: BinaryIO) -> None:
        while (window := self.link.window(Stream.OUTPUT_FILE)) and self.link.pending() < 4 * _READ:
            data = file.read(min(window, _READ))
            if not data:
                self.link.end_stream(Stream.OUTPUT_FILE)
                file.close()
                self.output_file = None
                return
            self.link.send_data(Stream.OUTPUT_FILE, data)

    def _changes(self) -> Iterator[bytes]:
        room = Room(**(self.room or {}))
        for number, mount in enumerate(mount for mount in self.mounts if mount["changes"]):
            yield Entry(Record.ROOT, b"%d" % number).encoded()
            yield from changes(self.files.trees[mount["tree"]], os.fsencode(mount["sub"]), room)
        yield Entry(Record.END, b"").encoded()

    def _send_trees(self) -> None:
        while self.trees and (window := self.link.window(self.trees[0][0])) and self.link.pending() < 4 * _READ:
            stream, pieces = self.trees[0]
            with self.environment.platform.reading():
                while len(self.trees_held) < _READ and (more := next(pieces, b"")):
                    self.trees_held += more
            if not self.trees_held:
                self.link.end_stream(stream)
                del self.trees[0]
                continue
            count = self.link.send_data(stream, self.trees_held[: min(window, _READ)])
            self.trees_held = self.trees_held[count:]
