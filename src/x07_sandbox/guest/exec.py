"""One command: its standard streams, its CPU time, and how it ends; and the process that waits for the next one."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import termios
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from x07_sandbox.channel.link import DATA_MAX, WINDOW, Link, Stream
from x07_sandbox.channel.messages import ID_MAX, CommandLimits, Exec, Started
from x07_sandbox.channel.streams import HEADER
from x07_sandbox.guest.cgroup import cpu_ticks, pid_here
from x07_sandbox.guest.environment import exec_failure
from x07_sandbox.guest.system import JobError, children_of

if TYPE_CHECKING:
    from x07_sandbox.channel.messages import Terminal
    from x07_sandbox.guest.environment import Environment, Process


READ: Final = DATA_MAX - HEADER.size  # a frame then fills four 32 KiB writes of the console driver
PIPE_BYTES: Final = 1 << 20  # the most that a pipe can hold after programs have enlarged it (pipe(7))
TICK_S: Final = 0.1  # interval of CPU limit checks
# After _SHORT_READS short reads in a row without input in between, pause reading, so that a program that writes line by
# line is not interrupted for every line.
_SHORT: Final = 2048
_LONG: Final = 16 * 1024
_SHORT_READS: Final = 4
_PAUSE_S: Final = 0.005
_END_OF_INPUT: Final = b"\x04"  # of a terminal in its usual mode
_STALL_S: Final = 0.5  # a check that is later than this means that the host has paused the machine


class _Output:
    """An output pipe. number: the number of its stream; 0 until the first bytes open it.

    left: the most bytes to read once the program has ended.
    """

    def __init__(self, fd: int, stream: Stream) -> None:
        self.fd = fd
        self.stream = stream
        self.number = 0
        self.left = PIPE_BYTES


class Command:
    """A command from its start to its end. fail: called with the error if it cannot be executed.

    started_at: when it could start, on the monotonic clock.
    wait_status: as of waitpid(2), once its process has ended. was_last: whether init has then killed all others.
    running: whether it was executed. ended: whether it and its output have ended. killed: whether the host asked for
    its end. stopped: whether a signal had stopped it then.
    """

    def __init__(
        self,
        order: Exec,
        process: Process,
        link: Link,
        environment: Environment,
        fail: Callable[[JobError, int], object],
    ) -> None:
        self.order = order
        self.process = process
        self.running = self.ended = self.stopped = self.killed = self.cpu_exceeded = False
        self.wait_status: int | None = None
        self.started_at = 0.0
        self.was_last = False
        self._link = link
        self._environment = environment
        self._fail = fail
        self._cpu_before_us = process.cpu_before_us
        self._cpu_seen_us = 0
        self._cpu_checked_at = time.monotonic()
        self._stdin_fd, self._status_fd = process.stdin_fd, process.status_fd
        outputs = (_Output(process.stdout_fd, Stream.STDOUT), _Output(process.stderr_fd, Stream.STDERR))
        self._outputs = [output for output in outputs if output.fd >= 0]
        for fd in (process.stdout_fd, process.stderr_fd, process.stdin_fd):
            if fd >= 0:
                os.set_blocking(fd, False)
        self._status = self._pid = b""
        self._read_at = self._paused_until = 0.0  # for output
        self._short_reads = 0
        self._stdin = 0  # the number of the input's stream, once it is open
        self._held: deque[memoryview] = deque()  # input not yet written to the program; at most one window
        self._uncounted = 0  # bytes of it that came on a stream of the VM of which this one is a copy
        self._input_ended = False

    # waiting

    def register(self, poll: select.poll) -> None:
        """Register the descriptors to wait for."""
        if self._status_fd >= 0:
            poll.register(self._status_fd, select.POLLIN)
        if self.running and not self.paused_s():
            # If the host's reader stalls, the window is full, and only this program blocks.
            for output in self._outputs:
                if self._window(output):
                    poll.register(output.fd, select.POLLIN)
        if self._stdin_fd >= 0 and self._held:
            poll.register(self._stdin_fd, select.POLLOUT)

    def paused_s(self) -> float:
        """Return for how many seconds the agent must not read output."""
        if self._short_reads < _SHORT_READS or self.wait_status is not None:
            return 0.0
        return max(0.0, self._paused_until - time.monotonic())

    def handle(self, fd: int, mask: int) -> bool:
        """Handle a ready descriptor. Return False if it is not this command's."""
        if fd == self._status_fd:
            self._take_status()
        elif fd == self._stdin_fd:
            self._feed(broken=bool(mask & select.POLLERR))
        else:
            for output in self._outputs:
                if output.fd == fd:
                    self._carry(output)
                    return True
            return False
        return True

    def tick(self) -> None:
        """Do whatever is due after events, or because time has passed."""
        if not self.running or self.ended:
            return
        if self.wait_status is None:
            if not self.cpu_exceeded:
                self._check_cpu()
            return
        self._end_streams()
        self.ended = not self._outputs

    # input

    def open_input(self, number: int) -> None:
        """Record the number of the input's stream."""
        self._stdin = number

    def take_input(self, data: bytes, *, ended: bool = False) -> None:
        """Take bytes for standard input, or its end."""
        self._short_reads = 0
        if data:
            self._held.append(memoryview(data))
        self._input_ended |= ended
        self._feed()

    def _feed(self, *, broken: bool = False) -> None:
        """Write buffered input to the program's standard input.

        If the program has closed its standard input, discard the rest.
        """
        while self._held and self._stdin_fd >= 0 and not broken:
            try:
                count = os.write(self._stdin_fd, self._held[0])
            except BlockingIOError:
                return
            except BrokenPipeError:
                broken = True
            else:
                self._consumed(count)
                if rest := self._held.popleft()[count:]:
                    self._held.appendleft(rest)
        if (broken or self._input_ended) and self._stdin_fd >= 0 and self.order.terminal is None:
            os.close(self._stdin_fd)
            self._stdin_fd = -1
        if self.order.terminal is not None and self._input_ended:
            self._input_ended = False
            self._held.append(memoryview(_END_OF_INPUT))
            self._feed()
        if self._stdin_fd < 0 and self._held:
            self._consumed(sum(map(len, self._held)))
            self._held.clear()

    def rejoin(self) -> None:
        """Go on in a copy of the VM: no stream is open, and each opens again when it has data."""
        self._stdin, self._uncounted = 0, sum(map(len, self._held))
        for output in self._outputs:
            output.number = 0

    def _consumed(self, count: int) -> None:
        uncounted = min(count, self._uncounted)
        self._uncounted -= uncounted
        self._link.streams.consumed(self._stdin, count - uncounted)

    # output

    def _window(self, output: _Output) -> int:
        return self._link.streams.window(output.number) if output.number else WINDOW

    def _carry(self, output: _Output) -> None:
        """Pass on what the pipe holds, as far as the window allows.

        More at a time means fewer changes between program and agent, which are expensive under emulation.
        """
        while most := min(READ, self._window(output)):
            try:
                data = os.read(output.fd, most)
            except BlockingIOError:
                return
            except OSError:  # no process has the terminal open
                data = b""
            if not data:
                self._end_output(output)
                return
            if not output.number:
                output.number = self._link.open(output.stream, self.order.id)
            self._link.streams.send(output.number, data)
            if self.wait_status is not None:
                output.left -= len(data)
            self._count_read(len(data))
            if len(data) < most:
                return

    def _count_read(self, size: int) -> None:
        now = time.monotonic()
        most = _SHORT if self._short_reads < _SHORT_READS else _LONG
        in_row = size < most and now - self._read_at < 3 * _PAUSE_S
        self._short_reads = self._short_reads + 1 if in_row else 0
        self._read_at, self._paused_until = now, now + _PAUSE_S

    def _end_streams(self) -> None:
        """Close each output pipe once all that it held at the command's end has been read.

        Another process may still write to it.
        """
        for output in list(self._outputs):
            poll = select.poll()
            poll.register(output.fd, select.POLLIN)
            if output.left <= 0 or not poll.poll(0):
                self._end_output(output)

    def _end_output(self, output: _Output) -> None:
        self._outputs.remove(output)
        self._link.streams.finish(output.number)
        os.close(output.fd)

    # start and end

    def _take_status(self) -> None:
        """Read the status pipe. If the pipe ends without a message, the program was executed."""
        if data := os.read(self._status_fd, 8192):
            self._status += data
            return
        os.close(self._status_fd)
        self._status_fd = -1
        if self.process.key:  # it has written its process id, in its namespace
            self._pid, _, self._status = self._status.partition(b"\n")
        if self._status:
            self._fail(exec_failure(self._status), self.order.id)
            return
        limits = self.order.limits
        if limits.mem_bytes < self._environment.waiting_bytes:
            self.process.group.limit(mem_bytes=limits.mem_bytes, tasks=limits.tasks)
        self.running = True
        self._link.send(Started(self.order.id))
        if self.killed:  # perhaps before it had joined its group
            self._environment.signal(self.process)

    def close(self) -> None:
        """Close all descriptors and remove the group of a command that has ended or could not be executed."""
        fds = [self._stdin_fd, self._status_fd, *(output.fd for output in self._outputs)]
        for fd in fds:
            if fd >= 0:
                os.close(fd)
        self._stdin_fd = self._status_fd = -1
        self._outputs.clear()
        self.process.group.remove()

    def resize(self, size: Terminal) -> None:
        """Change the size of the terminal, if there is one."""
        if self.order.terminal is not None and self._stdin_fd >= 0:
            termios.tcsetwinsize(self._stdin_fd, size)

    def stop(self, number: int) -> None:
        """Send a signal at the host's request. With SIGKILL, record whether a signal had stopped the program before."""
        if number != signal.SIGKILL:
            if self.wait_status is None:
                self._environment.signal(self.process, number)
            return
        self.killed = True
        if self.wait_status is None:
            self.stopped = self.process.group.program_stopped(self._environment.init)
            self._environment.signal(self.process)

    def _check_cpu(self) -> None:
        now = time.monotonic()
        late_s = now - self._cpu_checked_at - TICK_S
        if late_s < 0:
            return
        self._cpu_checked_at = now
        used_us = self.cpu_us()
        if late_s > _STALL_S:
            # The agent has priority over the program (cpu.weight), so the whole machine was paused, and the guest's
            # kernel has charged that time to the program.
            stall_us = min(int(late_s * 1_000_000), used_us - self._cpu_seen_us)
            self._cpu_before_us += stall_us
            used_us -= stall_us
        self._cpu_seen_us = used_us
        limit_us = self.order.limits.cpu_ms * 1000
        if used_us > limit_us and (not self._environment.shared or self._tree_cpu_us() > limit_us):
            self.cpu_exceeded = True
            self._environment.signal(self.process)

    def _tree_cpu_us(self) -> int:
        """Return the CPU time of the command's process tree, for a group that other commands share."""
        parent = self._environment.init
        pids = [pid_here(parent, int(self._pid))] if self._pid else children_of(parent)[:1]
        return sum(map(cpu_ticks, pids)) * 1_000_000 // os.sysconf("SC_CLK_TCK")

    def cpu_us(self) -> int:
        """Return the CPU time of the command, in microseconds, with that of others in its group."""
        return self.process.group.cpu_us(self._environment.init) - self._cpu_before_us


class Spare:
    """The process for the next command, which most often is a plain one with the limits of the last one.

    While it waits it is one of the programs' tasks. It has their user, so they can stop or kill it.
    add: starts a process for a command, which waits for its start message.
    """

    def __init__(self, environment: Environment, add: Callable[[Exec], Process]) -> None:
        self._environment = environment
        self._add = add
        self._process: Process | None = None
        self._limits: CommandLimits | None = None
        self._count = 0

    def __bool__(self) -> bool:
        """Whether a process waits."""
        return self._process is not None

    def prepare(self, limits: CommandLimits) -> None:
        """Start a process, unless commands have no control groups of their own here, or one waits already."""
        if self._process is None and self._environment.own_groups:
            self._count += 1
            self._limits = limits
            with contextlib.suppress(OSError, JobError):  # the next command then gets a process of its own
                self._process = self._add(Exec(ID_MAX + self._count, [], {}, "/", limits))

    def take(self, order: Exec) -> Process | None:
        """Return the process that waits, or None. If it does not fit *order*, end it, since it counts as a task."""
        process = self._process
        if process is None:
            return None
        if not order.is_plain or self._limits != order.limits:
            self.drop()
            return None
        self._process = None
        self._environment.signal(process, signal.SIGCONT)
        return process._replace(cpu_before_us=process.group.cpu_us(self._environment.init))

    def ended(self, key: int) -> None:
        """Note that init has reaped the process *key*: a program may have killed ours."""
        if self._process is not None and self._process.key == key:
            self.drop()

    def drop(self) -> None:
        """End the process, if one waits."""
        process, self._process = self._process, None
        if process is not None:
            self._environment.signal(process)
            for fd in (process.stdin_fd, process.stdout_fd, process.stderr_fd, process.start_fd, process.status_fd):
                os.close(fd)
            process.group.remove()
