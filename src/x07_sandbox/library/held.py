"""Sandboxes that another process holds, so that they outlive whoever opened them: the side of the clients."""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import threading
import weakref
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import msgspec

from x07_sandbox.channel.link import Stream
from x07_sandbox.channel.messages import Exec, encode
from x07_sandbox.errors import BackendError, ChannelUsageError, Command, SandboxError, UsageError
from x07_sandbox.host.documents import prepared
from x07_sandbox.host.processes import close_on_fork
from x07_sandbox.host.sockets import connected
from x07_sandbox.library import resident
from x07_sandbox.library.held_messages import (
    Answer,
    Attach,
    Call,
    End,
    EndInput,
    Finished,
    Input,
    Output,
    Request,
    Resize,
    Returned,
    Signal,
    Start,
    Started,
    Status,
    Watch,
)
from x07_sandbox.library.resident import Problem, Reader, packed
from x07_sandbox.options import milliseconds
from x07_sandbox.records.runs import SOCKET, all_runs, record_of
from x07_sandbox.sessions.command import AnySandbox, Ended, Process
from x07_sandbox.sessions.execution import Execution, terminal_kind
from x07_sandbox.sessions.execution import order as command_order
from x07_sandbox.sessions.result import Diff, Result, stored_result
from x07_sandbox.sessions.shared import SharedSession
from x07_sandbox.sessions.transfers import CommandStreams, kept_streams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from x07_sandbox.library.held_messages import Create
    from x07_sandbox.sessions.result import ChangesChoice

_T = TypeVar("_T")
_READ: Final = 256 * 1024
_PIECE: Final = 64 * 1024
_UNREAD_MAX: Final = 512 * 1024  # of a command; further output waits in the holder and in the VM
_ANSWER_S: Final = 60.0
_ENDED_S: Final = 5.0
_CONNECT_S: Final = 10.0
_STREAMS: Final = {"stdout": Stream.STDOUT, "stderr": Stream.STDERR}
_BAD: Final = (msgspec.MsgspecError, ValueError)


class HeldExecution(Execution):
    """A command in a held sandbox.

    ending: how it ended. problem: why it could not be started. closed: whether no answers follow.
    """

    ending: Ended | None = None
    problem: SandboxError | None = None
    closed = False

    @property
    def ended(self) -> bool:
        """Whether the command and its output have ended, or it could not be started."""
        return self.closed or self.ending is not None


class _Connection:
    """A connection of a command, or the one that waits for the end of the sandbox (execution: None)."""

    def __init__(self, owned: socket.socket, execution: HeldExecution | None) -> None:
        self.socket = owned
        self.execution = execution
        self.reader: Reader[Answer] = Reader(Answer)
        self.out = bytearray()
        self.input_ended = False
        owned.settimeout(0)

    def fill(self) -> None:
        """Queue input of the command to send."""
        execution = self.execution
        if execution is None or self.input_ended or len(self.out) > _PIECE:
            return
        waiting = execution.waiting_input()
        if waiting:
            self.out += packed(Input(data=bytes(waiting[:_PIECE])))
            del waiting[:_PIECE]
        elif execution.input_done:
            self.out += packed(EndInput())
            self.input_ended = True

    def events(self) -> int:
        """Return what to wait for."""
        wanted = select.POLLOUT if self.out else 0
        if self.execution is None:
            return wanted | select.POLLIN
        unread = self.execution.inbox("stdout").size + self.execution.inbox("stderr").size
        return wanted | (select.POLLIN if unread < _UNREAD_MAX else 0)

    def write(self) -> None:
        """Send some of what is queued, or nothing more if the holder has closed the connection. Raises OSError."""
        try:
            del self.out[: self.socket.send(self.out)]
        except BlockingIOError:
            pass
        except BrokenPipeError:  # the command has ended: its end has arrived, and is still to be read
            self.out.clear()
            self.input_ended = True

    def read(self) -> list[Answer] | None:
        """Return the answers that have arrived, or None at the end of the connection. Raises OSError, ValueError."""
        try:
            data = self.socket.recv(_READ)
        except BlockingIOError:
            return []
        return self.reader.take(data) if data else None


class HeldSession:
    """The commands of a held sandbox, with the methods of `Session` that `SharedSession` needs."""

    def __init__(self, run: str) -> None:
        self.waiting: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        self.over = False
        self.busy = False  # the holder counts
        self.result: Result | None = None
        self._run = run
        self._connections: list[_Connection] = []
        self._add(Watch(), None)

    def _add(self, request: Request, execution: HeldExecution | None) -> None:
        if self.over:
            raise _bad_answer(self._run)
        connection = _Connection(connect(self._run), execution)
        connection.out += packed(request)
        self._connections.append(connection)

    def execute(
        self, order: Exec, given: CommandStreams, wall_ms: int | None, term: str = "", *, flags: bool = False
    ) -> HeldExecution:
        """Start a command. wall_ms: its timeout. The number in *order* is replaced by that of the holder."""
        execution = HeldExecution(order, given, wall_ms)
        _, payload = encode(order)
        self._add(Start(payload, None if wall_ms is None else wall_ms / 1000, term, flags), execution)
        return execution

    def attach(self, number: int, *, flags: bool) -> HeldExecution:
        """Take over a detached command. Its input stays open, if it has any."""
        execution = HeldExecution(command_order([]), kept_streams(), None)
        self._add(Attach(number, flags), execution)
        return execution

    def stop(self, execution: Execution, number: int) -> None:
        """Send a signal to a command, or end a service."""
        if execution.order.service:
            for one in self._connections:
                if one.execution is execution:
                    self._drop(one)
        elif not execution.ended:
            self._tell(Signal(id=execution.order.id, number=number))

    def resize(self, execution: Execution, rows: int, columns: int) -> None:
        """Change the size of a command's terminal, if it has not ended. The last of several calls counts."""
        for one in self._connections:
            if one.execution is execution:
                one.out += packed(Resize(rows=rows, columns=columns))

    def _tell(self, request: Request) -> None:
        with contextlib.suppress(OSError, BackendError), _connection(self._run) as connection:
            connection.sendall(packed(request))

    def read(self, execution: Execution, name: Literal["stdout", "stderr"]) -> bytes:
        """Return what has arrived on a stream of the command."""
        return execution.inbox(name).pull()[0]

    def turn(self, within_s: float, wake_fd: int) -> None:
        """Send and receive what is due; wait for at most *within_s* seconds, or until wake_fd is readable."""
        poll, by_fd = select.poll(), {}
        poll.register(wake_fd, select.POLLIN)
        for one in self._connections:
            one.fill()
            by_fd[one.socket.fileno()] = one
            poll.register(one.socket, one.events())
        with self.waiting:
            ready = poll.poll(within_s * 1000)
        for fd, mask in ready:
            if (connection := by_fd.get(fd)) is not None and connection in self._connections:
                self._serve(connection, mask)

    def _serve(self, connection: _Connection, mask: int) -> None:
        try:
            if mask & select.POLLOUT:
                connection.write()
            if mask & ~select.POLLOUT:
                answers = connection.read()
                for answer in answers or ():
                    self._take(connection.execution, answer)
                if answers is None:
                    self._drop(connection)
        except (OSError, *_BAD):  # the holder has ended, or is of another version
            self._drop(connection)

    def _take(self, execution: HeldExecution | None, answer: Answer) -> None:
        if execution is None:
            if isinstance(answer, Finished):
                self.result = answer.result
            return
        match answer:
            case Started():
                execution.order = execution.order._replace(id=answer.id)
            case Output():
                execution.take_output(_STREAMS[answer.stream], answer.data)
            case End():
                execution.ending = answer.ended
            case Problem():
                execution.problem = answer.error()
            case _:
                raise ValueError("the answer does not fit the request")

    def _drop(self, connection: _Connection) -> None:
        self._connections.remove(connection)
        close_on_fork.discard(connection.socket.fileno())
        connection.socket.close()
        if connection.execution is None:
            self.over = True
        else:
            connection.execution.closed = True

    def close(self) -> None:
        """Close all connections."""
        for one in list(self._connections):
            self._drop(one)


class HeldSandbox(AnySandbox):
    """A sandbox that a holder has opened."""

    outlives = True

    def __init__(self, run: str, *, flags: bool = False) -> None:
        """Connect to a sandbox. flags: whether messages name flags instead of keywords. Raises BackendError."""
        self._session = HeldSession(run)
        super().__init__(run)
        self._flags = flags
        self._left = False
        self._at_end: list[Callable[[], object]] = []
        self._lock = threading.Lock()
        self._commands: dict[int, Process] = {}
        own = weakref.WeakMethod(self._on_end)  # so that a client that nobody uses any more is left
        self.session = SharedSession(self._session, math.inf, None, lambda _why: (own() or bool)())
        weakref.finalize(self, _leave, self.session, self._session)
        self.session.begin()

    @property
    def result(self) -> Result | None:
        """See `AnySandbox`. It is known no later than the end of the session."""
        return self._session.result

    @result.setter
    def result(self, value: Result | None) -> None:
        self._session.result = value

    def _on_end(self) -> None:
        self._session.close()
        with self._lock:
            calls, self._at_end = self._at_end, []
        for call in calls:
            call()

    def gone(self) -> BackendError:
        """See `AnySandbox.gone`."""
        if self._left:
            why = "this object was disconnected from it"
            return BackendError("cannot use the sandbox", why, "Connect again", code="sandbox-lost")
        self.session.until(lambda: False, _ENDED_S)  # the end of a command may arrive before that of its sandbox
        return super().gone() if self.session.over and not _is_paused(self.run) else _bad_answer(self.run)

    def disconnect(self) -> None:
        """See `AnySandbox.disconnect`."""
        self._left = True
        self.session.end()
        self._on_end()

    def start(self, asked: Exec, timeout_s: float | None = None, term: str = "") -> Process:
        """See `AnySandbox.start`."""
        self.require_open()
        wall_ms = None if timeout_s is None else milliseconds(timeout_s)
        term = "" if asked.terminal is None else term or terminal_kind()
        try:
            with self.session.using():
                streams = kept_streams(open_input=not asked.detached)
                execution = self._session.execute(asked, streams, wall_ms, term, flags=self._flags)
        except (TypeError, AttributeError, ValueError, ChannelUsageError) as exc:
            raise UsageError("cannot run the command", f"its arguments are malformed ({exc})", "Pass strings") from exc
        return self._started(execution, wall_ms)

    def _started(self, execution: HeldExecution, wall_ms: int | None) -> Process:
        self.session.until(lambda: execution.order.id > 0 or execution.ended)
        if execution.problem is not None:
            raise self._problem(execution.problem)
        if not execution.order.id:
            raise self.gone()
        command = Process(self, execution, wall_ms, str)  # the holder words its end
        if not execution.order.service:
            self._commands[command.id] = command
        return command

    def command(self, number: int) -> Process | None:
        """See `AnySandbox.command`."""
        known = self._commands.get(number)
        if known is None or getattr(known.execution, "problem", None) is not None:  # the sandbox was rolled back
            self.require_open()
            with self.session.using():
                execution = self._session.attach(number, flags=self._flags)
            return self._started(execution, None)
        return known

    def ending(self, command: Process) -> Ended:
        """See `AnySandbox.ending`."""
        execution = command.execution
        assert isinstance(execution, HeldExecution)
        self._commands.pop(command.id, None)
        if execution.problem is not None:
            raise self._problem(execution.problem)
        if execution.ending is None:
            raise self.gone()
        return execution.ending

    def _problem(self, found: SandboxError) -> SandboxError:
        """Return the error for a problem of a command: a sandbox that another client has paused is not lost."""
        has_ended = found.code in {"sandbox-lost", "sandbox-closed"}
        return _bad_answer(self.run) if has_ended and _is_paused(self.run) else found

    def at_end(self, call: Callable[[], object]) -> None:
        """See `AnySandbox.at_end`."""
        with self._lock:
            self.require_open()
            self._at_end.append(call)

    def changes(self) -> Diff:
        """See `AnySandbox.changes`."""
        return self._call(Diff, "changes")

    def fork(self, count: int, given: Mapping[str, Any]) -> list[HeldSandbox]:
        """Return *count* forks of the sandbox. given: keywords of `Sandbox.fork`."""
        runs = self._call(tuple[str, ...], "fork", count, dict(given), self._flags)
        return [HeldSandbox(run, flags=self._flags) for run in runs]

    def snapshot(self, name: str) -> str:
        """See `AnySandbox.snapshot`."""
        return self._call(str, "snapshot", name)

    def checkpoint(self) -> int:
        """See `AnySandbox.checkpoint`."""
        return self._call(int, "checkpoint")

    def rollback(self, point: int) -> None:
        """See `AnySandbox.rollback`."""
        self._call(type(None), "rollback", point)
        self._commands.clear()  # others have their numbers

    def pause(self) -> None:
        """See `AnySandbox.pause`."""
        self._call(type(None), "pause")
        self.disconnect()

    def extend(self, lifetime_s: float) -> None:
        """See `AnySandbox.extend`."""
        self._call(type(None), "extend", lifetime_s, within_s=_ANSWER_S)

    def _call(self, kind: type[_T], name: str, *given: object, within_s: float | None = None) -> _T:
        self.require_open()
        return call(self.run, kind, name, *given, within_s=within_s)

    def finish(self, choice: ChangesChoice) -> Result:
        """See `AnySandbox.finish`."""
        if self.result is None:
            try:
                self.result = call(self.run, Result, "finish", choice)
            except BackendError:
                self.result = stored_result(self.run)  # if somebody else has closed it
                if self.result is None:
                    raise
            self.session.until(lambda: self.session.over, _ANSWER_S)
        return self.result


def _leave(shared: SharedSession, session: HeldSession) -> None:
    shared.end()
    session.close()


def connect(run: str) -> socket.socket:
    """Connect to the holder of a sandbox. Raises BackendError."""
    try:
        connection = connected(all_runs() / run, SOCKET, _CONNECT_S)
    except OSError as exc:
        if _is_paused(run):
            raise _bad_answer(run) from exc
        why = "it has ended" if isinstance(exc, FileNotFoundError | ConnectionError) else exc.strerror or str(exc)
        raise BackendError(f"cannot connect to sandbox {run}", why, "Open a new sandbox", code="sandbox-lost") from exc
    close_on_fork.add(connection.fileno())
    return connection


@contextlib.contextmanager
def _connection(run: str) -> Iterator[socket.socket]:
    """Connect to the holder of a sandbox for one request. Raises BackendError."""
    with connect(run) as connection:
        try:
            yield connection
        finally:
            close_on_fork.discard(connection.fileno())


def call(run: str, kind: type[_T], name: str, *given: object, within_s: float | None = None) -> _T:
    """Have a holder carry out a method of CALLS, and return what it returns, of type *kind*.

    within_s: for the answer, which else takes as long as it takes. Raises BackendError, or the error of the method.
    """
    reader: Reader[Answer] = Reader(Answer)
    found: list[Answer] = []
    with _connection(run) as connection:
        connection.settimeout(within_s)
        try:
            connection.sendall(packed(Call(name, given)))
            while not found and (data := connection.recv(_READ)):
                found = reader.take(data)
            if found and isinstance(found[0], Returned):
                return msgspec.convert(found[0].value, prepared(kind))
        except (OSError, *_BAD) as exc:
            raise _bad_answer(run) from exc
    raise found[0].error() if found and isinstance(found[0], Problem) else _bad_answer(run)


def discard(run: str) -> None:
    """Close a sandbox, and discard its changes. Raises SandboxError."""
    call(run, Result, "finish", "discard")


def status_of(run: str) -> Status | None:
    """Return facts about a sandbox from its holder, or None if it does not answer."""
    with contextlib.suppress(SandboxError):
        return call(run, Status, "status", within_s=5.0)
    return None


def _is_paused(run: str) -> bool:
    return (record := record_of(run)) is not None and bool(record.paused)


def _bad_answer(run: str) -> BackendError:
    what, why = "cannot use the sandbox", "the process that holds it has ended, or is of another version"
    if _is_paused(run):
        return BackendError(what, "it was paused", "Connect again", code="sandbox-lost")
    fix = (Command(f"x07 sandbox close {run}"), " closes it, with its changes; see also x07 sandbox list")
    return BackendError(what, why, fix, code="sandbox-lost")


def create(asked: Create, cancel_fd: int, progress: Callable[[str], None] = lambda _text: None) -> str:
    """Start a holder, which opens a sandbox. Return the sandbox's id. Raises SandboxError.

    cancel_fd: readable once the caller no longer wants the sandbox; Cancelled is raised then.
    """
    import pickle  # only here

    with os.fdopen(os.memfd_create("x07-holder"), "r+b") as log:
        given, cancel = pickle.dumps(asked), (cancel_fd, "the sandbox was not opened")
        module, what = "x07_sandbox.library.holder", "cannot open the sandbox"
        run, _ = resident.start(what, module, log=log, progress=progress, given=given, cancel=cancel)
        return run
