"""The conversation with the guest agent during one session. One loop also enforces output limits and deadlines."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

from x07_sandbox.backends.base import wait_for_exit
from x07_sandbox.channel import streams
from x07_sandbox.channel.connection import Carrier
from x07_sandbox.channel.link import COMMANDS_MAX, DATA_MAX, LinkState, State, Stream
from x07_sandbox.channel.messages import (
    CONNECT,
    FILES,
    Changes,
    Closed,
    Denied,
    Exec,
    Exited,
    Failed,
    Hold,
    Message,
    Open,
    Resize,
    Resume,
    Started,
    Stop,
)
from x07_sandbox.channel.streams import Event
from x07_sandbox.errors import BackendError, PeerError, UsageError
from x07_sandbox.host import settings
from x07_sandbox.host.waiting import Deadline, input_poll
from x07_sandbox.policy.outcomes import Evidence, Stage
from x07_sandbox.sessions.execution import CONNECTIONS_MAX, FILL, Execution, Facts, Limit

if TYPE_CHECKING:
    from x07_sandbox.backends.base import Instance
    from x07_sandbox.host.waiting import Cancel
    from x07_sandbox.sessions.transfers import CommandStreams, InFile, Receivers, Sink

_IDLE_S: Final = 60.0  # between two turns of the loop without any deadline
_RECEIVED: Final = {Stream.OUTPUT, Stream.CHANGES, Stream.LEFT}
_NO_SNAPSHOT: Final = "cannot take a snapshot of the sandbox"
_ALONE: Final = contextlib.nullcontext()


class Arrival:
    """A stream of changes on its way to *receiver*.

    ended: whether all of it has arrived, or the receiver takes no more.
    """

    def __init__(self, receiver: Any) -> None:  # noqa: ANN401 - the receivers have `take` in common
        self.receiver = receiver
        self.ended = False


class Session:
    """The event loop of one session. Each needs a new object. Not thread-safe; see `SharedSession`.

    Commands may be started and stopped at any time. Between calls of `until` or `turn`, no data is moved and no
    deadline is enforced.
    waiting: entered for each wait, so that other threads can use the session meanwhile.
    """

    def __init__(
        self,
        instance: Instance,
        cancel: Cancel,
        opening: Open | None,
        files: Sequence[InFile] = (),
        gate_fds: tuple[int, int | None] | None = None,
        adopted: Sequence[Execution] = (),
    ) -> None:
        """Open the session on an instance whose agent has answered, and send its files.

        opening: None for a fork, whose programs then go on. adopted: its commands.

        gate_fds: a descriptor that becomes readable when the egress gate has ended, and one that takes the relay's
        bytes to the gate, if the relay shares the channel. None without a gate.
        """
        self.waiting: contextlib.AbstractContextManager[object] = _ALONE
        self._instance = instance
        self._cancel = cancel
        self._gate_fd: int | None = None
        self._relay_fd: int | None = None
        if gate_fds is not None:
            self._gate_fd, self._relay_fd = gate_fds
        self._carrier: Carrier | None = None
        self._connection = instance.greeting.connection
        self._link = self._connection.link
        self._close_limit: Limit | None = None
        self._seen: dict[str, Any] = {}  # fields of `Evidence`
        self._over = False
        self._executions: dict[int, Execution] = {}  # that run, or whose output is being passed on
        self._wanted: list[Arrival] = []  # asked for, and not yet opened by the guest
        self._arrivals: dict[int, Arrival] = {}  # by the numbers of their streams
        self._receivers: Receivers | None = None  # once the session is to close
        self._last: Execution | None = None  # after which the session closes
        self._closed: Closed | None = None
        self._link.send(Resume() if opening is None else opening)
        for one in adopted:
            self._adopt(one)
        self._files = [_Copy(file, self._link.open(Stream.INPUT, number)) for number, file in enumerate(files)]
        self._start_limit: Limit | None = Limit(settings.COPY_IN_S)  # for copying in, and for the start of commands
        if opening is None:
            self._set_start_limit()

    # what the caller asks for

    def using(self) -> contextlib.AbstractContextManager[Session]:
        """Return a context for calls of methods, as `SharedSession` needs one."""
        return contextlib.nullcontext(self)

    @property
    def over(self) -> bool:
        """Whether the session was closed, or lost."""
        return self._over

    @property
    def busy(self) -> bool:
        """Whether a command is starting or running, other than the file server."""
        return any(not one.ended and one.order.service != FILES for one in self._executions.values())

    def execute(self, order: Exec, given: CommandStreams, wall_ms: int | None) -> Execution:
        """Start a command once all files have arrived. wall_ms: see `Execution`. Raises UsageError."""
        running = [one.order.service for one in self._executions.values() if not one.ended]
        if order.service == CONNECT and running.count(CONNECT) >= CONNECTIONS_MAX:
            why = f"{CONNECTIONS_MAX} connections to this sandbox are open already"
            raise UsageError("cannot connect", why, "Close one of them")
        if len(running) >= COMMANDS_MAX:
            why = f"{COMMANDS_MAX} commands run in this sandbox already"
            raise UsageError("cannot start the command", why, "Wait until one of them has ended")
        self._link.send(order)
        self._executions[order.id] = execution = Execution(order, given, wall_ms, self._now_ms())
        execution.stdin = self._link.open(Stream.STDIN, order.id)
        self._start_limit = Limit(settings.COPY_IN_S)
        return execution

    def stop(self, execution: Execution, number: int = signal.SIGKILL) -> None:
        """Send a signal to a command, if it has not ended. SIGKILL goes to all its processes."""
        if execution.ended or self._over or execution.asked_to_stop or execution.replaced:
            return
        if number == signal.SIGKILL:
            self._stop(execution)
        else:
            self._link.send(Stop(execution.order.id, number))

    def read(self, execution: Execution, name: Literal["stdout", "stderr"] = "stdout") -> bytes:
        """Return what is kept of a stream of the command, and let the guest send more."""
        data, count = execution.inbox(name).pull()
        self._link.streams.consumed(execution.outputs.get(Stream[name.upper()], 0), count)
        return data

    def resize(self, execution: Execution, rows: int, columns: int) -> None:
        """Change the size of a command's terminal, if it has not ended."""
        if not execution.ended and not self._over:
            self._link.send(Resize(execution.order.id, rows, columns))

    def _adopt(self, execution: Execution) -> None:
        self._executions[execution.order.id] = execution
        execution.stdin = self._link.open(Stream.STDIN, execution.order.id)
        if execution.order.service or execution.asked_to_stop:  # its client is that of another sandbox
            execution.asked_to_stop = False
            self._stop(execution)

    # snapshots

    def hold(self) -> None:
        """Stop all programs, so that the VM can be saved. Raises UsageError, BackendError.

        Nothing else may use the session before `go_on`, which must follow in any case.
        """
        commands = [one for one in self._executions.values() if not one.ended]
        if (
            self._files
            or self._wanted
            or self._arrivals
            or any(one.order.service == FILES and one.unanswered for one in commands)
        ):
            raise UsageError(_NO_SNAPSHOT, "files are being copied to or from it", "Try again once that has ended")
        limit = Deadline.after(settings.HOLD_S)
        self._link.send(Hold(self._link.holds + 1))
        # Once HOLD is out, nothing may be sent: in the VM's copies it would arrive without a beginning.
        while self._link.pending() and self._connection.flush() and self._link.pending():
            if self._ended_before(limit, select.POLLOUT):
                break
        while self._link.state is State.HOLDING and not self._over and not self._ended_before(limit, select.POLLIN):
            try:
                self._receive()
            except PeerError as exc:
                self._end(channel_error=f"{exc.what}: {exc.why}")
        if not self.held:
            raise BackendError(_NO_SNAPSHOT, "its programs did not stop in time", "Try again when it is less busy")

    def _ended_before(self, limit: Deadline, wanted: int) -> bool:
        """Wait for the channel. Return whether the VM, or the time, has ended before."""
        poll = input_poll(self._instance.pidfd, self._cancel.fd)
        poll.register(self._instance.channel_fd, wanted)
        return [fd for fd, _ in poll.poll(limit.left_s() * 1000)] != [self._instance.channel_fd]

    @property
    def held(self) -> bool:
        """Whether all programs are held."""
        return self._link.state is State.HELD and self._link.stopped

    def end(self) -> None:
        """End the session without a word to the guest: its VM is saved."""
        self._over = True

    def go_on(self) -> None:
        """Let the programs go on after `hold`, whether it has succeeded or not."""
        if not self._over and self._link.state in {State.HOLDING, State.HELD}:
            self._link.send(Resume())
            self._connection.flush()

    def leave(self, last_command: int) -> None:
        """End the session, since the sandbox goes back to a moment when *last_command* was the last command."""
        for number, execution in self._executions.items():
            if number > last_command or execution.order.service:
                execution.rolled_back = not execution.ended
                execution.seen["rolled_back"] = True
            else:
                execution.replaced = True
        self._over = True

    def unended(self) -> tuple[LinkState, list[Execution]]:
        """Return the state of the channel, and the commands that have not ended, of a VM that is held."""
        return self._link.held(), [one for one in self._executions.values() if not one.ended]

    def changes(self, receiver: Any) -> Arrival:  # noqa: ANN401 - a files/incoming.Incoming
        """Ask for the changes so far."""
        self._link.send(Changes())
        self._wanted.append(Arrival(receiver))
        return self._wanted[-1]

    def run(self, order: Exec, given: CommandStreams, wall_ms: int, receivers: Receivers) -> Facts:
        """Run one command, and close the session after it. Return what is known about the command."""
        self._last, self._receivers = self.execute(order, given, wall_ms), receivers
        self._link.send(receivers.closing(order.id))
        self.until(lambda: False)
        return self.facts(self._last)

    def close(self, receivers: Receivers, within_s: float = settings.CHANGES_OUT_S) -> Closed | None:
        """End all commands, take what is asked for, and close the session. Return None if it was lost before.

        within_s: how long the guest may take without progress.
        """
        if not self._over:
            for execution in self._executions.values():
                execution.cut_off = not execution.ended
            self._link.send(receivers.closing())
            self._receivers, self._close_limit = receivers, Limit(within_s)
            self._take_no_more(*self._executions.values())
            self.until(lambda: False)
        return self._closed

    def until(self, done: Callable[[], bool], within_s: float | None = None) -> bool:
        """Run the loop until *done* returns True, the session is over, or time is up. Return the value of *done*."""
        wait = None if within_s is None else Limit(within_s)
        while not (come := done()) and not self._over and (wait is None or wait.left_s() > 0):
            self.turn(_IDLE_S if wait is None else wait.left_s())
        return come or done()

    def turn(self, within_s: float = _IDLE_S, wake_fd: int | None = None) -> None:
        """Do what is due, wait for at most *within_s* seconds until there is more to do, and do that.

        wake_fd: ends the wait once it is readable.
        """
        try:
            self._turn(within_s, wake_fd)
        except PeerError as exc:
            self._end(channel_error=f"{exc.what}: {exc.why}")

    def facts(self, execution: Execution) -> Facts:
        """Return what is known about a command now."""
        if self._over and execution.exited is None:
            self._seen["console_tail"] = self._instance.console_tail()
        seen = dict(self._seen)
        if execution.ended and execution is not self._last:
            seen.clear()  # what happened later has not ended it
        elif execution.stage is Stage.RUN:
            seen.pop("deadline_passed", None)  # of the session, not its own
        times_ms = self._instance.greeting.times_ms
        return execution.facts(self._closed, times_ms, self._now_ms(), **seen)

    def evidence(self) -> Evidence:
        """Return the evidence about the end of the session itself."""
        return Evidence(stage=Stage.RUN, console_tail=self._instance.console_tail(), **self._seen)

    # the loop

    def _turn(self, within_s: float, wake_fd: int | None) -> None:
        self._fill()  # first, since progress of a copy extends the deadline
        if self._time_is_up():
            return
        if not self._connection.flush():
            self._lost()
            return
        all_limits = self._start_limit, self._close_limit, *(one.limit for one in self._executions.values())
        limits = [limit for limit in all_limits if limit]
        left_s = min((within_s, *(limit.left_s() for limit in limits)))
        poll = self._poll(wake_fd)
        with self.waiting:
            ready = poll.poll(left_s * 1000 + 1)
        for fd, mask in ready:
            if fd != wake_fd:
                self._ready(fd, mask)
            if self._over:
                return

    def _poll(self, wake_fd: int | None) -> select.poll:
        progress = [fd for one in self._executions.values() for fd in one.progress_fds()]
        stdin = [one.streams.stdin_fd or 0 for one in self._executions.values() if self._wants_input(one)]
        # The order matters: handle data from the guest before the end of its stream.
        fds = self._instance.channel_fd, self._instance.pidfd, self._cancel.fd
        gate = [] if self._gate_fd is None or not self._is_running() else [self._gate_fd]
        wake = [] if wake_fd is None else [wake_fd]
        poll = input_poll(*fds, *gate, *self._instance.side_fds(), *stdin, *progress, *wake)
        poll.register(self._instance.channel_fd, select.POLLIN | (select.POLLOUT if self._link.pending() else 0))
        if self._carrier is not None:
            self._carrier.register(poll)
        return poll

    def _is_running(self) -> bool:
        """Return whether a command is starting or running."""
        return any(not one.ended for one in self._executions.values())

    def _wants_input(self, execution: Execution) -> bool:
        return execution.wants_input() and self._link.streams.window(execution.stdin) > 0

    def _ready(self, fd: int, mask: int) -> None:
        if fd == self._cancel.fd:
            self._end(cancelled_by=self._cancel.signal or 0)
        elif fd == self._instance.channel_fd:
            if mask & (select.POLLIN | select.POLLHUP | select.POLLERR):
                self._receive()
        elif fd == self._instance.pidfd:
            self._lost()
        elif fd == self._gate_fd:
            self._end(gate_lost=True)
        elif self._carrier is not None and fd == self._carrier.fd:
            self._carrier.handle(mask)
        elif not any(self._ready_for(execution, fd) for execution in list(self._executions.values())):
            self._instance.drain(fd)

    def _ready_for(self, execution: Execution, fd: int) -> bool:
        if pumped := execution.pump(fd):
            stream, count = pumped
            self._link.streams.consumed(execution.outputs.get(stream, 0), count)
            self._forget_if_done(execution)
            return True
        if fd == execution.streams.stdin_fd:
            execution.read_input()
            return True
        return False

    def _time_is_up(self) -> bool:
        """Handle deadlines that have passed. Return whether the session is over."""
        if self._over:
            return True
        fds = self._instance.channel_fd, self._instance.pidfd, self._cancel.fd
        if self._start_limit is not None and self._start_limit.is_up(*fds):
            self._start_is_late()
        if self._close_limit is not None and self._close_limit.is_up(*fds):
            self._end(deadline_passed=True)
        for execution in self._executions.values():
            if execution.limit is None or not execution.limit.is_up(*fds):
                continue
            if execution.asked_to_stop:
                self._end()
            else:
                # The verdict stays a timeout whatever the guest reports now, but the report may add details.
                self._stop(execution, deadline_passed=True)
        return self._over

    def _start_is_late(self) -> None:
        """End the session, or only the commands that do not start, which another command can cause by stopping them."""
        starting = [one for one in self._executions.values() if one.starting]
        if self._files or self._last is not None or not starting:
            self._end(deadline_passed=True)
            return
        self._start_limit = None
        for execution in starting:
            if not execution.asked_to_stop:
                self._stop(execution, deadline_passed=True)

    # from the guest

    def _receive(self) -> None:
        events = self._connection.read()
        if events is None:
            self._lost()
            return
        for event in events:
            if isinstance(event, Event):
                self._take_event(event)
            else:
                self._take(event)
            if self._over:
                return

    def _take(self, message: Message) -> None:
        if isinstance(message, Failed):
            self._failed(message)
        elif isinstance(message, Closed):
            for number, execution in self._executions.items():
                if not execution.ended:
                    raise PeerError("message out of order", f"CLOSED before the end of command {number}")
            self._closed = message
            if self._receivers is not None and (output := self._receivers.output) is not None:
                output.complete = output.size == message.output_bytes
            self._end()
        elif isinstance(message, Started):
            execution = self._executions[message.id]
            execution.times_ms["started"] = self._now_ms()
            execution.started()
            self._set_start_limit()
        elif isinstance(message, Denied):
            self._executions[message.id].deny(message)
        elif isinstance(message, Exited):
            execution = self._executions[message.id]
            execution.ran(self._now_ms(), message.wall_us / 1000)
            execution.end(message)
            if execution is self._last:
                self._close_limit = Limit(settings.CHANGES_OUT_S)
                self._take_no_more(*self._executions.values())
            self._forget_if_done(execution)

    def _failed(self, failed: Failed) -> None:
        if failed.id and (execution := self._executions[failed.id]) is not self._last:
            execution.fail(failed)
            self._set_start_limit()
            self._forget_if_done(execution)
        else:
            self._end(setup_failure=f"{failed.stage}: {failed.message}", exec_errno=failed.errno if failed.id else 0)

    def _set_start_limit(self) -> None:
        """Clear the deadline if nothing is on its way to its start."""
        if not self._files and not any(one.starting for one in self._executions.values()):
            self._start_limit = None

    def _forget_if_done(self, execution: Execution) -> None:
        if execution.ended and not execution.progress_fds():
            self._executions.pop(execution.order.id, None)

    def _take_event(self, event: Event) -> None:
        if event.stream in self._arrivals and event.type in {streams.FIN, streams.RESET}:
            self._arrivals.pop(event.stream).ended = True
        if event.type == streams.RESET:  # the guest sends, or takes, no more of this stream
            return
        stream, data = Stream(event.code), event.data
        if stream in {Stream.STDOUT, Stream.STDERR}:
            self._take_output(self._executions[self._link.subject(event.stream)], stream, event)
        elif stream is Stream.RELAY:
            self._take_relay(event)
        elif stream in _RECEIVED:
            if event.type == streams.OPEN:
                self._expect(stream, event.stream)
            elif event.type == streams.DATA:
                self._link.streams.consumed(event.stream, len(data))
                if not self._arrivals[event.stream].receiver.take(data):
                    self._refuse(stream, event.stream)

    def _take_output(self, execution: Execution, stream: Stream, event: Event) -> None:
        if event.type == streams.OPEN:
            execution.outputs[stream] = event.stream
        elif event.type == streams.DATA:
            self._link.streams.consumed(event.stream, execution.take_output(stream, event.data))
            if not execution.asked_to_stop and (overflow := execution.overflow()):
                self._stop(execution, **overflow)

    def _take_relay(self, event: Event) -> None:
        if event.type == streams.OPEN:
            if self._relay_fd is None:
                raise PeerError("bad frame", "RELAY was not asked for")
            self._carrier = Carrier(self._link.streams, event.stream, self._relay_fd)
        elif self._carrier is not None:
            self._carrier.take(event)

    def _expect(self, stream: Stream, number: int) -> None:
        """Note a stream that the guest opened. Raises PeerError if it was not asked for."""
        if stream is Stream.CHANGES and self._wanted:
            self._arrivals[number] = self._wanted.pop(0)
            return
        receiver = None if self._is_running() else getattr(self._receivers, stream.name.lower(), None)
        if receiver is None:
            raise PeerError("bad frame", f"{stream.name} was not asked for")
        self._arrivals[number] = Arrival(receiver)
        if stream is Stream.OUTPUT and self._last is not None and self._last.asked_to_stop:
            self._link.streams.reset(number)

    def _refuse(self, stream: Stream, number: int) -> None:
        """Reset a stream whose receiver takes no more.

        Raises PeerError for the output file, whose largest size was in CLOSE.
        """
        if stream is Stream.OUTPUT:
            raise PeerError("bad frame", "the output file is larger than was asked for")
        self._link.streams.reset(number)
        self._arrivals.pop(number).ended = True
        if self._receivers is not None and self._receivers.left is None:
            self._end()  # nothing that is still to come matters

    # to the guest

    def _fill(self) -> None:
        if self._link.state not in {State.OPEN, State.CLOSING}:
            return
        for copy in self._files:
            if problem := self._send_file(copy):
                self._end(setup_failure=problem)
                return
        if self._files:
            self._files = [copy for copy in self._files if not copy.done]
            self._set_start_limit()
        for execution in self._executions.values():
            held = execution.waiting_input()
            if held and self._link.pending() < FILL:
                del held[: self._link.streams.send(execution.stdin, held)]
            if execution.input_done and not held:
                self._link.streams.finish(execution.stdin)

    def _send_file(self, copy: _Copy) -> str:
        """Send more of a file. Return why that is impossible, or ""."""
        channel, file = self._link.streams, copy.file
        while copy.sent < file.size and channel.pending() < FILL and (window := channel.window(copy.number)):
            data = os.pread(file.fd, min(DATA_MAX, window, file.size - copy.sent), copy.sent)
            if not data:
                return f"{file.path} was truncated while it was read"
            copy.sent += channel.send(copy.number, data)
            if self._start_limit is not None and copy.sent - copy.counted >= min(DATA_MAX, file.size - copy.counted):
                copy.counted = copy.sent  # a guest that takes single bytes makes no progress
                self._start_limit.set(settings.COPY_IN_S)
        if copy.sent == file.size:
            copy.done = True
            channel.finish(copy.number)
        return ""

    def _stop(self, execution: Execution, **seen: object) -> None:
        """Ask the guest to end a command. The guest may still report its exit and changes. seen: evidence to add."""
        execution.seen.update(seen)
        execution.asked_to_stop = True
        self._link.send(Stop(execution.order.id, signal.SIGKILL))
        execution.limit = Limit(settings.SANDBOX_STOPPED_S if self._last is None else settings.STOPPED_S)
        self._take_no_more(execution)

    def _take_no_more(self, *executions: Execution) -> None:
        """Drop further output that is kept for a caller, so that commands that nobody reads can end."""
        for execution in executions:
            for stream, count in execution.take_no_more():
                self._link.streams.consumed(execution.outputs.get(stream, 0), count)

    def _lost(self) -> None:
        # If this process was stopped (SIGSTOP), `x07 kill` has asked it to cancel, and then ended the VM itself.
        self._end(instance_status=wait_for_exit(self._instance), cancelled_by=self._cancel.signal)

    def _end(self, **seen: object) -> None:
        self._seen.update(seen)
        self._over = True

    def _now_ms(self) -> float:
        return round((time.monotonic() - self._instance.greeting.released_at) * 1000, 1)


class _Copy:
    """A file on its way to the guest. number: of its stream. sent: bytes so far. counted: those that were progress."""

    def __init__(self, file: InFile, number: int) -> None:
        self.file = file
        self.number = number
        self.sent = self.counted = 0
        self.done = False


def drain(sinks: tuple[Sink, ...], cancel: Cancel) -> bool:
    """Wait, without a deadline, until the readers of the output have taken all of it. Return False if cancelled."""
    while fds := [sink.progress_fd for sink in sinks if sink.progress_fd is not None]:
        for fd, _ in input_poll(cancel.fd, *fds).poll():
            if fd == cancel.fd:
                return False
            for sink in sinks:
                if sink.progress_fd == fd:
                    sink.pump()
    return True
