"""A sandbox, its commands and its files as callers see them, whichever process has opened the sandbox."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import msgspec
from msgspec.structs import replace

from x07_sandbox.errors import ArgumentError, BackendError, SandboxError, UsageError, whole_number
from x07_sandbox.host.settings import OUTPUT_MAX_BYTES
from x07_sandbox.policy.denials import Denial, Hint, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from x07_sandbox.channel.messages import Exec
    from x07_sandbox.errors import Flag
    from x07_sandbox.sessions.execution import Execution
    from x07_sandbox.sessions.files import FileServer
    from x07_sandbox.sessions.result import ChangesChoice, Diff, Result
    from x07_sandbox.sessions.shared import CommandSession, SharedSession

StreamName = Literal["stdout", "stderr"]
Keep = Literal["head", "tail", "both"]

KEEPS: Final = ("head", "tail", "both")
STREAMS: Final[tuple[StreamName, StreamName]] = ("stdout", "stderr")
_NOBODY: Final = "nobody waits any more"
_WHY_GONE: Final = {
    "": "it was closed",
    "expired": "it reached its lifetime",
    "idle": "it was idle for too long",
    "lost": "its VM was lost",
}
caller: Final = threading.local()
"""`gone`: a function that returns whether nobody waits for what this thread does. Call `wake` once it does."""


def given_up() -> bool:
    """Return whether nobody waits for what this thread does."""
    gone: Callable[[], bool] | None = getattr(caller, "gone", None)
    return gone is not None and gone()


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """How a command of a sandbox ended.

    id: its number in the sandbox. outcome: how it ended, in the same words as `Result.outcome`. reason_code: the code
    of the reason (docs/reference/codes.md). reason: the same in one sentence. x07_exit_code: the exit code of `x07
    sandbox exec`, such as 124 after a timeout, or 128 and the number of a signal. exit_code: its exit status, or None
    if it did not exit by itself. signal: the signal that ended it, or None. stdout, stderr: its output, as far as it
    was kept. truncated: whether there was more output. wall_ms, cpu_ms: elapsed time and CPU time in milliseconds.
    memory_peak_bytes: the peak memory use of all commands of the sandbox while it ran. denials: what it was denied;
    `how_to_allow.flag` is the option of `Sandbox` or flag that would allow it. Denied connections are those since the
    last command ended before this one started. hints: what it seems to lack, according to its output.
    """

    id: int
    outcome: Outcome
    reason_code: str
    reason: str
    x07_exit_code: int
    exit_code: int | None
    signal: int | None
    stdout: bytes = b""
    stderr: bytes = b""
    truncated: bool = False
    wall_ms: float
    cpu_ms: float
    memory_peak_bytes: int
    denials: tuple[Denial, ...]
    hints: tuple[Hint, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the command exited with status 0."""
        return self.outcome == "ok"

    def for_model(self, max_bytes: int = 20_000) -> str:
        """Return text for a language model: the outcome and exit code, what was denied, and the output.

        The first line has the facts from x07-sandbox. All below it is untrusted text, with control characters escaped,
        in at most about *max_bytes* bytes: beginning and end of longer output.
        """
        from x07_sandbox.sessions.model_text import answer_of

        return answer_of(self, self.stdout, self.stderr, _whole("max_bytes", max_bytes, 100, 1 << 30)).text()

    def _repr_html_(self) -> str:
        """Return the same as HTML, which notebooks show."""
        from x07_sandbox.sessions.html import command_fragment

        nested = {name: msgspec.to_builtins(getattr(self, name)) for name in ("denials", "hints")}
        return command_fragment(msgspec.structs.asdict(self) | nested)


class FileInfo(NamedTuple):
    """A file, folder or other entry of a sandbox. mode: permission bits. target: of a link, else "".

    size: in bytes. mtime_s: when its content last changed, in seconds since 1970.
    """

    name: str
    kind: Literal["file", "folder", "link", "other"]
    mode: int
    size: int
    mtime_s: float
    target: str


class Kept:
    """What is kept of one output stream: at most *most* bytes of its beginning, its end, or half of each."""

    def __init__(self, most: int, keep: Keep) -> None:
        self._head_max = {"head": most, "tail": 0, "both": most // 2}[keep]
        self._tail_max = most - self._head_max
        self._head = bytearray()
        self._tail = bytearray()
        self.size = 0  # of all that arrived

    def take(self, data: bytes) -> None:
        """Add what has arrived."""
        self.size += len(data)
        room = self._head_max - len(self._head)
        self._head += data[:room]
        if self._tail_max and len(data) > room:
            self._tail += data[room:]
            if len(self._tail) > 2 * self._tail_max:  # not each time, since each time costs a copy
                del self._tail[: -self._tail_max]

    @property
    def truncated(self) -> bool:
        """Whether bytes were left out."""
        return self.size > self._head_max + self._tail_max

    def data(self) -> bytes:
        """Return what is kept. Between beginning and end, a line says how many bytes were left out."""
        tail = bytes(self._tail[max(0, len(self._tail) - self._tail_max) :])
        gap = b""
        if self.truncated and self._head_max and self._tail_max:
            gap = b"\n[... %d bytes left out ...]\n" % (self.size - len(self._head) - len(tail))
        return bytes(self._head) + gap + tail


class Process:
    """A command that runs in a sandbox. Thread-safe, except that one thread at a time may read a stream.

    While its output is not read, a command that writes more than 2 MiB waits. A process may also be iterated: that
    yields ("stdout" or "stderr", bytes) as output arrives, until the command has ended.
    """

    def __init__(
        self, sandbox: AnySandbox, execution: Execution, wall_ms: int | None, word: Callable[[Flag], str]
    ) -> None:
        """Take a command that was started. wall_ms: the limit of its time, or None. word: see `errors.worded`."""
        self.execution = execution
        self.wall_ms = wall_ms
        self.word = word
        self.began_at = time.monotonic()
        self._sandbox = sandbox
        self._session = sandbox.session
        self._unread: dict[StreamName, bytes] = {"stdout": b"", "stderr": b""}
        # Positions in the streams of a detached command, which may have many readers.
        self._at: dict[StreamName, int] = {"stdout": 0, "stderr": 0}
        self._kept: dict[StreamName, Kept] = {}
        self._ending_lock = threading.Lock()
        self._ending: Ended | None = None
        self._source: Process | None = None  # whose `ending` counts

    @property
    def id(self) -> int:
        """The number of the command in its sandbox."""
        return self.execution.order.id

    @property
    def ended(self) -> bool:
        """Whether the command has ended. Output may still wait to be read."""
        return self.execution.ended

    @property
    def _completed(self) -> bool:
        """Whether the command has ended before its sandbox. One that ended with it raises, whoever notices first."""
        return self.execution.ended and not self.execution.cut_off

    def feed(self, data: bytes) -> None:
        """Queue bytes for the standard input, without waiting until the command takes them."""
        with self._using():
            self.execution.write(data)

    def write(self, data: bytes) -> None:
        """Send bytes to the standard input, and wait while much of it is on its way.

        Raises BrokenPipeError if the command has ended before that, and SandboxError if the sandbox has.
        """
        self._sandbox.require_open()
        lost = self.ended
        if not lost:
            self.feed(data)
            if not self._session.until(lambda: self.execution.has_room() or self.ended or given_up()):
                raise self._sandbox.gone()
            lost = self._unsent()
        if lost:
            raise BrokenPipeError(errno.EPIPE, "the command has ended")

    def _unsent(self) -> bool:
        """Return whether the command has ended before it was sent all its input, which may itself have ended it."""
        return self.ended and bool(self.execution.waiting_input())

    def close_stdin(self) -> None:
        """End the standard input."""
        with self._using():
            self.execution.end_input()

    def read(self, stream: StreamName = "stdout", timeout_s: float | None = None) -> bytes:
        """Return what has arrived on a stream; wait for at least one byte. Return b"" once the command has ended.

        Raises TimeoutError after *timeout_s*, and SandboxError if the sandbox has ended.
        """
        data = self._next(stream, timeout_s)
        if given_up():  # nobody takes it
            self._unread[stream] = data + self._unread[stream]
        return data

    def _next(self, stream: StreamName, timeout_s: float | None) -> bytes:
        if stream not in STREAMS:
            raise bad_value("stream", stream, "'stdout' or 'stderr'")
        deadline = _deadline(timeout_s)
        while not (data := self._arrived(stream)) and not self._completed:
            left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not self.until(left_s, output=(stream,)):
                raise TimeoutError(_NOBODY if given_up() else f"no output within {timeout_s} s")
        return data or self._arrived(stream)

    def read_until(
        self,
        end: bytes,
        stream: StreamName = "stdout",
        timeout_s: float | None = None,
        *,
        max_bytes: int = OUTPUT_MAX_BYTES,
    ) -> bytes:
        """Return what arrives on a stream up to and with *end*, such as a line feed or a prompt. The rest stays.

        It has another end if the command has ended, or if *max_bytes* came without *end*. Raises TimeoutError after
        *timeout_s*, and SandboxError if the sandbox has ended. A call that raises loses nothing.
        """
        if not isinstance(end, bytes) or not end:
            raise bad_value("end", end, "bytes to wait for")
        found, size, deadline = bytearray(), 0, _deadline(timeout_s)
        try:
            while not size:
                left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
                data, seen = self._next(stream, left_s), max(0, len(found) - len(end) + 1)
                found += data
                at = found.find(end, seen, max_bytes)
                size = at + len(end) if at >= 0 else max_bytes if len(found) >= max_bytes else 0
                if not data or given_up():
                    break
        except BaseException:
            self._unread[stream] = bytes(found) + self._unread[stream]
            raise
        taken = 0 if given_up() else size or len(found)
        self._unread[stream] = bytes(found[taken:]) + self._unread[stream]
        return bytes(found[:taken])

    def __iter__(self) -> Iterator[tuple[StreamName, bytes]]:
        ended = False
        while not ended:
            ended, pieces = self.next_pieces()
            yield from pieces

    def poll(self) -> Ended | None:
        """Return how the command ended, or None while it runs."""
        return self.wait() if self.ended else None

    def wait(self, timeout_s: float | None = None) -> Ended:
        """Wait for the end of the command, and return how it ended, with the output that was not read.

        Raises TimeoutError if it still runs after *timeout_s*, and SandboxError if the sandbox has ended.
        """
        return self.collect(OUTPUT_MAX_BYTES, "head", None, timeout_s)

    def signal(self, number: int) -> None:
        """Send a signal to the command, if it has not ended. SIGKILL goes to all its processes."""
        number = _whole("number", number, 1, 64)
        with self._using() as session:
            session.stop(self.execution, number)

    def kill(self) -> None:
        """Kill all processes of the command, if it has not ended."""
        self.signal(signal.SIGKILL)

    def resize(self, rows: int, columns: int) -> None:
        """Change the size of the command's terminal, in characters."""
        size = _whole("rows", rows, 1, 65535), _whole("columns", columns, 1, 65535)
        with self._using() as session:
            session.resize(self.execution, *size)

    # for x07 itself

    def until(self, within_s: float | None = None, output: Sequence[StreamName] = ()) -> bool:
        """Wait until the command has ended, or one of the streams *output* can be read.

        Return False after *within_s*, or if nobody waits any more. Raises BackendError if the sandbox ends first.
        """

        def due() -> bool:
            arrived = (self._unread[stream] or self._waiting(stream) for stream in output)
            return self._completed or given_up() or self.execution.replaced or any(arrived)

        self._sandbox.require_own_process()
        if self._session.until(due, within_s):
            if self.execution.replaced and not self._completed:
                why, fix = "the sandbox was rolled back while it ran", "Get it again by its id: Sandbox.process(id)"
                raise BackendError(f"cannot use command {self.id}", why, fix, code="rolled-back")
            return not given_up()
        if self._session.over:
            raise self._sandbox.gone()
        return False

    def next_pieces(self, within_s: float | None = None) -> tuple[bool, list[tuple[StreamName, bytes]]]:
        """Wait for output or the end of the command. Return whether there will be no more output, and the output.

        Raises BackendError if the sandbox ends first.
        """
        self.until(within_s, output=STREAMS)
        ended = self._completed or given_up()
        return ended, [(stream, data) for stream in STREAMS if (data := self._arrived(stream))]

    def collect(
        self,
        most: int,
        keep: Keep,
        on_output: Callable[[StreamName, bytes], object] | None,
        timeout_s: float | None = None,
    ) -> Ended:
        """Wait for the end of the command, and return how it ended, with the output that was kept.

        A call that raises loses nothing: the next one goes on with what was kept.
        """
        deadline, ended = _deadline(timeout_s), False
        self._kept = kept = self._kept or {name: Kept(most, keep) for name in STREAMS}
        while not ended:
            left_s = None if deadline is None else deadline - time.monotonic()
            if left_s is not None and left_s <= 0:
                raise TimeoutError(f"command {self.id} still runs after {timeout_s} s")
            ended, pieces = self.next_pieces(left_s)
            for name, data in pieces:
                kept[name].take(data)
                if on_output is not None:
                    on_output(name, data)
        if not self._completed:
            raise TimeoutError(_NOBODY)
        truncated = any(one.truncated for one in kept.values())
        return replace(self.ending(), stdout=kept["stdout"].data(), stderr=kept["stderr"].data(), truncated=truncated)

    def again(self) -> Process:
        """Return an object for the same detached command, which reads all output that is kept."""
        other = Process(self._sandbox, self.execution, self.wall_ms, self.word)
        other.began_at, other._source = self.began_at, self
        return other

    def ending(self) -> Ended:
        """Return how the command ended, without its output. Raises BackendError if the sandbox ended first."""
        if self._source is not None:
            self._source.word = self.word
            return self._source.ending()
        with self._ending_lock:
            if self._ending is None:
                self._ending = self._sandbox.ending(self)
            return self._ending

    def send_all(self, read: Callable[[], bytes]) -> None:
        """Send what *read* returns to the standard input. End it at b"", at an error, or if nobody takes it."""
        with contextlib.suppress(OSError, SandboxError):
            while data := read():
                self.write(data)
        self.close_stdin()

    def tail(self) -> bytes:
        """Return the ends of both streams, as they have arrived."""
        return b"\n".join(tail for stream in STREAMS if (tail := self.execution.inbox(stream).tail))

    def kept(self, stream: StreamName) -> bytes:
        """Return what `collect` has kept of a stream until now."""
        return self._kept[stream].data() if self._kept else b""

    def wake(self) -> None:
        """Have all callers look whether they still wait."""
        self._session.wake()

    def _using(self) -> AbstractContextManager[CommandSession]:
        self._sandbox.require_own_process()
        return self._session.using()

    def _arrived(self, stream: StreamName) -> bytes:
        """Return what has arrived on a stream since the last call."""
        unread, self._unread[stream] = self._unread[stream], b""
        inbox = self.execution.inbox(stream)
        if inbox.backlog is not None:
            data, self._at[stream] = inbox.backlog.since(self._at[stream])
            return unread + data
        return unread + self._session.read(self.execution, stream)

    def _waiting(self, stream: StreamName) -> bool:
        inbox = self.execution.inbox(stream)
        return inbox.waiting if inbox.backlog is None else inbox.backlog.end > self._at[stream]


class AnySandbox(ABC):
    """A sandbox of this process, or of another one (`library/held`). Thread-safe. run: its id.

    session: carries its commands. result: its result, once it has ended.
    """

    session: SharedSession
    outlives = False  # whether it outlives this process

    def __init__(self, run: str) -> None:
        self.run = run
        self.result: Result | None = None
        self._pid = os.getpid()

    @property
    def left_out(self) -> tuple[Denial, ...]:
        """One denial for each reason why entries of folders were not copied in."""
        from x07_sandbox.records.runs import record_of

        record = record_of(self.run)
        return () if record is None else record.left_out

    @abstractmethod
    def start(self, asked: Exec, timeout_s: float | None = None, term: str = "") -> Process:
        """Start a command: see `order`. Its cwd is relative to the sandbox's working folder.

        timeout_s: None for no limit of its own. term: TERM of a command with a terminal, unless its environment or the
        sandbox sets it; "" for that of this process. Raises SandboxError if it cannot be started, the sandbox is closed
        or the call is wrong.
        """

    def file_server(self) -> FileServer:
        """Start a file server. Raises SandboxError if the sandbox is closed."""
        from x07_sandbox.channel.messages import FILES
        from x07_sandbox.sessions.execution import order  # most callers run commands
        from x07_sandbox.sessions.files import FileServer

        return FileServer(self.session, self.start(order([], service=FILES)).execution)

    @abstractmethod
    def command(self, number: int) -> Process | None:
        """Return a command that has not been waited for, or None."""

    @abstractmethod
    def ending(self, command: Process) -> Ended:
        """Return how a command ended, without its output. `Process.ending` calls this once."""

    @abstractmethod
    def at_end(self, call: Callable[[], object]) -> None:
        """Call *call* when the sandbox ends. Raises BackendError if it has ended."""

    @abstractmethod
    def snapshot(self, name: str) -> str:
        """Keep a snapshot of the sandbox, which goes on. Return its id. Raises SandboxError."""

    @abstractmethod
    def checkpoint(self) -> int:
        """Save the sandbox for `rollback`, and return the number of the checkpoint. The newest ones are kept."""

    @abstractmethod
    def rollback(self, point: int) -> None:
        """Go back to a checkpoint. Raises SandboxError, and changes nothing then.

        Commands that were started after it end as cancelled. Those that ran then are detached ones from now on.
        """

    @abstractmethod
    def changes(self) -> Diff:
        """Return what has changed in folders of the host so far. Raises SandboxError."""

    @abstractmethod
    def extend(self, lifetime_s: float) -> None:
        """Let the sandbox last for lifetime_s seconds from now. Raises BackendError."""

    @abstractmethod
    def finish(self, choice: ChangesChoice) -> Result:
        """End all commands, close the sandbox, and apply, keep or discard its changes. A second call does nothing."""

    def pause(self) -> None:
        """Save the sandbox, and free its memory, until somebody connects to it. Raises SandboxError."""
        why = "it ends with the process that opened it"
        raise UsageError("cannot pause this sandbox", why, "Open it by Sandbox.create, or take a snapshot of it")

    def disconnect(self) -> None:
        """Leave a sandbox that outlives this process. Its commands are killed, except detached ones."""
        raise UsageError("cannot leave this sandbox", "it ends with the process that opened it", "Close it")

    def require_open(self) -> None:
        """Raise BackendError if the sandbox is no longer open, and UsageError in a forked child."""
        self.require_own_process()
        if self.session.over:
            raise self.gone()

    def require_own_process(self) -> None:
        """Raise UsageError in a forked child, in which no thread serves the sandbox."""
        if os.getpid() != self._pid:
            raise UsageError("cannot use this sandbox", "it belongs to the parent process", "Open a new sandbox")

    def gone(self) -> BackendError:
        """Return the error for a call after the end of the sandbox."""
        result, why = self.result, self.session.why
        if result is not None and result.reason_code == "closed":
            why = ""
        what, fix = "cannot use the sandbox", "Open a new sandbox"
        if not why:
            error = BackendError(what, _WHY_GONE[why], fix, code="sandbox-closed")
        else:
            error = BackendError(what, _WHY_GONE[why] if result is None else result.reason, fix, code="sandbox-lost")
        error.result = result
        return error


def bad_value(name: str, value: object, wanted: str) -> UsageError:
    """Return the error for a wrong value of an argument of a call about a command."""
    return ArgumentError("cannot do this with a command", f"{name} is {value!r}", f"Use {wanted}")


def _whole(name: str, value: int, least: int, most: int) -> int:
    return whole_number(value, bad_value(name, value, f"a number from {least} to {most}"), least, most)


def _deadline(timeout_s: float | None) -> float | None:
    return None if timeout_s is None or math.isinf(timeout_s) else time.monotonic() + timeout_s


def checked(ended: Ended) -> Ended:
    """Return *ended*. Raises SandboxError unless the command succeeded."""
    if ended.ok:
        return ended
    error = SandboxError(f"command {ended.id} ended as {ended.outcome}", ended.reason, "See the result of this error")
    error.result = ended
    raise error
