"""The process that holds a sandbox, so that it outlives whoever opened it, and its socket in the folder of the run.

    python -m x07_sandbox.library.holder READY_FD

Standard input is a pickled `Create`, from a process of the same user. READY_FD: see `library/resident`. The process
ends with its sandbox. SIGTERM and SIGINT end the sandbox and keep its changes.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import socket
import sys
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec

from x07_sandbox.errors import SandboxError, UsageError
from x07_sandbox.host import start_thread
from x07_sandbox.host.sockets import listening
from x07_sandbox.host.waiting import Cancel
from x07_sandbox.library.held_messages import (
    CALLS,
    Attach,
    Call,
    ClientMessage,
    Create,
    End,
    EndInput,
    Finished,
    Input,
    Output,
    Resize,
    Returned,
    Signal,
    Start,
    Started,
    Status,
    Watch,
)
from x07_sandbox.library.opening import open_sandbox
from x07_sandbox.library.resident import Problem, Progress, Reader, Ready, Server, Starter, packed, run
from x07_sandbox.options import keyword
from x07_sandbox.records.runs import SOCKET, all_runs
from x07_sandbox.sessions.command import caller

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from x07_sandbox.library.held_messages import Answer
    from x07_sandbox.sessions.command import Process
    from x07_sandbox.sessions.sandbox import OpenSandbox

_READ: Final = 256 * 1024
_REQUEST_S: Final = 10.0  # for a client to send its request
_ENDED_S: Final = 10.0  # for clients to get the end of their commands
_LOOK_S: Final = 5.0  # between two looks whether the client of a command that takes no input is still there


class _Client:
    """One connection of a client. Its thread sends; another one may receive."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.messages = self._messages()

    def request(self) -> ClientMessage | None:
        """Return the first message, or None if there is none. Raises OSError, ValueError."""
        self.connection.settimeout(_REQUEST_S)
        request = next(self.messages, None)
        self.connection.settimeout(None)
        return request

    def _messages(self) -> Iterator[ClientMessage]:
        """Yield messages until the client goes away. Raises OSError, ValueError."""
        reader: Reader[ClientMessage] = Reader(ClientMessage)
        while data := self.connection.recv(_READ):
            yield from reader.take(data)

    def has_left(self) -> bool:
        """Return whether the client has closed the connection, also while its messages are still to be read."""
        poll = select.poll()
        poll.register(self.connection, select.POLLRDHUP)
        return bool(poll.poll(0))

    def send(self, answer: Answer) -> None:
        """Send an answer. Raises OSError if the client is gone."""
        self.connection.sendall(packed(answer))


class Holder:
    """Serves the clients of a sandbox until the sandbox ends. Each connection has a thread."""

    def __init__(self, opened: OpenSandbox, listener: socket.socket) -> None:
        self._opened = opened
        self.server = Server(listener, self._serve_one)
        self._watchers: list[_Client] = []
        self._paused = False
        self._pausing = threading.Lock()
        own = {"status": self._status, "fork": self._fork, "pause": self._pause}
        self._methods: dict[str, Any] = {name: getattr(opened, name) for name in CALLS if name not in own} | own
        opened.at_end(self.server.end)

    def serve(self) -> None:
        """Serve until the sandbox ends, or `end` is called. Then close it, keep its changes, and tell the clients."""
        self.server.serve()
        with self._pausing:  # `serve` returns before the sandbox is paused
            result = None if self._paused else self._opened.finish("keep", self.server.signal)
        for watcher in list(self._watchers):
            with contextlib.suppress(OSError):  # it has gone away
                if result is not None:
                    watcher.send(Finished(result=result))
                watcher.connection.shutdown(socket.SHUT_RDWR)  # ends its thread
        self.server.join(_ENDED_S)

    def _serve_one(self, connection: socket.socket) -> None:
        client = _Client(connection)
        if (request := client.request()) is not None:
            try:
                self._carry_out(client, request)
            except SandboxError as exc:
                client.send(Problem.of(exc))

    def _carry_out(self, client: _Client, request: ClientMessage) -> None:
        opened = self._opened
        match request:
            case Start():
                started = opened.start(request.asked(), request.timeout_s, request.term)
                self._carry(client, started, flags=request.flags)
            case Attach():
                self._carry(client, self._detached(request.id), flags=request.flags)
            case Signal():
                if (command := opened.command(request.id)) is not None:
                    command.signal(request.number)
            case Call():
                self._call(client, request)
            case Watch():
                opened.require_open()
                self._watchers.append(client)
                try:
                    next(client.messages, None)  # until the client goes away, or the sandbox has ended
                finally:
                    self._watchers.remove(client)
            case _:
                raise ValueError("no request")

    def _call(self, client: _Client, request: Call) -> None:
        """Carry out a method about the whole sandbox, or undo it if nobody would learn of what it returns."""
        given = request.arguments()
        value = self._methods[request.name](*given)
        try:
            if client.has_left():
                raise BrokenPipeError
            client.send(Returned(value))
        except OSError:
            if request.name in _UNDO:
                _UNDO[request.name](value)

    def _status(self) -> Status:
        self._opened.require_open()
        session = self._opened.session
        return Status(left_s=max(0.0, session.until_s - time.monotonic()), commands=self._opened.running)

    def _fork(self, count: int, given: dict[str, Any], flags: bool) -> list[str]:  # noqa: FBT001 - of a message
        from x07_sandbox.library.opening import fork_runs  # few sandboxes are forked

        return fork_runs(self._opened, count, given, flags=flags)

    def _pause(self) -> None:
        with self._pausing:
            self._opened.put_away()
            self._paused = True

    def _detached(self, number: int) -> Process:
        command = self._opened.command(number)
        if command is None or not command.execution.order.detached:
            why = "no detached command has this id, or it was waited for"
            raise UsageError(f"there is no command {number}", why, "Start it again", code="no-such-command")
        return command.again()

    def _carry(self, client: _Client, command: Process, *, flags: bool) -> None:
        """Carry the streams of a command until it has ended or the client is gone."""
        command.word = str if flags else keyword
        gone = threading.Event()
        caller.gone = gone.is_set
        reader = threading.Thread(target=_receive, args=(client, command, gone), daemon=True)
        service = command.execution.order.service
        try:
            client.send(Started(id=command.id))
            start_thread(reader)
            ended = False
            while not ended:
                ended, pieces = command.next_pieces(_LOOK_S)
                for stream, data in pieces:
                    client.send(Output(stream=stream, data=data))
                if not ended and not pieces and client.has_left():  # the other thread may wait to write
                    gone.set()
            if not gone.is_set() and not service:
                client.send(End.of(command.ending()))
        except OSError:
            gone.set()
        except SandboxError as exc:  # such as a rollback
            with contextlib.suppress(OSError):
                client.send(Problem.of(exc))
            gone.set()
        caller.gone = None
        if gone.is_set() and not command.execution.order.detached and not command.execution.replaced:
            command.kill()
            if not service and command.until(_ENDED_S):
                command.ending()
        with contextlib.suppress(OSError):
            client.connection.shutdown(socket.SHUT_RDWR)  # ends `recv`


def _discard(runs: Sequence[str]) -> None:
    from x07_sandbox.library.held import discard  # few sandboxes are forked

    for one in runs:
        with contextlib.suppress(SandboxError):
            discard(one)


def _remove(snapshot: str) -> None:
    from x07_sandbox.library.snapshots import Snapshot  # as above

    Snapshot.find(snapshot).remove()


_UNDO: Final[dict[str, Callable[[Any], object]]] = {"fork": _discard, "snapshot": _remove}
"""What undoes methods of which nobody would learn."""


def _receive(client: _Client, command: Process, gone: threading.Event) -> None:
    with contextlib.suppress(OSError, SandboxError, msgspec.MsgspecError, ValueError):
        for message in client.messages:
            if isinstance(message, Input):
                with contextlib.suppress(BrokenPipeError):  # it has ended
                    command.write(message.data)
            elif isinstance(message, EndInput):
                command.close_stdin()
            elif isinstance(message, Resize):
                command.resize(message.rows, message.columns)
    gone.set()
    command.wake()


def _hold(starter: Starter) -> None:
    """Open the sandbox that standard input describes, and hold it until it ends."""
    asked: Create = pickle.load(sys.stdin.buffer)  # noqa: S301 - from this user's own process
    with contextlib.closing(Cancel()) as cancel:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda got, _frame: cancel(got))
        cancel.set_by_signals()

        def progress(text: str) -> None:
            if not running and not starter.report(Progress.of(text)):  # nobody reads it later
                cancel()

        running: list[OpenSandbox] = []
        word = str if asked.flags else keyword
        opened = open_sandbox(asked.options, cancel, choice=asked.choice, progress=progress, word=word)
        running.append(opened)
        with listening(all_runs() / opened.run, SOCKET) as listener:
            os.chdir("/")
            holder = Holder(opened, listener)
            holder.server.end_on_signals()
            if not starter.report(Ready(opened.run)):
                holder.server.end()  # nobody knows its id
            starter.close()
            holder.serve()


def main(words: list[str]) -> int:
    """Run the holder, and return its exit status."""
    starter = Starter(int(words[0]))
    return run(starter, partial(_hold, starter))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
