"""A sandbox as its callers use it, whether this process has opened it or another one, and its commands."""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import msgspec

from x07_sandbox.channel.link import Stream
from x07_sandbox.errors import BackendError, UsageError
from x07_sandbox.host.decoding import prepared
from x07_sandbox.policy.denials import Denial, Hint
from x07_sandbox.policy.outcomes import Verdict
from x07_sandbox.records.runs import SANDBOX, all_runs
from x07_sandbox.sessions.result import CommandReport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from x07_sandbox.channel.messages import Terminal
    from x07_sandbox.sessions.execution import Execution
    from x07_sandbox.sessions.files import FileServer
    from x07_sandbox.sessions.request import ChangesChoice
    from x07_sandbox.sessions.result import Diff, Result
    from x07_sandbox.sessions.shared import SharedSession
    from x07_sandbox.sessions.transfers import Inbox

StreamName = Literal["stdout", "stderr"]
_STREAMS: Final[dict[StreamName, Stream]] = {"stdout": Stream.STDOUT, "stderr": Stream.STDERR}
_TERM: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}")
_WHY_GONE: Final = {
    "": "it was closed",
    "expired": "it reached its lifetime",
    "idle": "it was idle for too long",
    "lost": "its VM was lost",
}


def _never() -> bool:
    return False


def terminal_kind() -> str:
    """Return TERM of this process if it is a plain name, else a kind that nearly every image knows."""
    kind = os.environ.get("TERM", "")
    return kind if _TERM.fullmatch(kind) else "xterm-256color"


class CommandStart(NamedTuple):
    """A command to start. cwd: relative to the sandbox's working folder. timeout_s: None for no limit of its own.

    merge: whether standard error goes to standard output. detached: whether the command has no streams. term: TERM of
    a command with a terminal, unless *env* or the sandbox sets it; "" for that of this process.
    """

    argv: Sequence[str]
    env: Mapping[str, str] = {}
    cwd: str | None = None
    timeout_s: float | None = None
    merge: bool = False
    terminal: Terminal | None = None
    detached: bool = False
    term: str = ""


class CommandEnd(msgspec.Struct, frozen=True, kw_only=True):
    """How a command ended. memory_peak_bytes: of all commands of the sandbox while it ran.

    denials: what it was denied. hints: what it seems to lack, according to its output.
    """

    verdict: Verdict
    report: CommandReport
    denials: tuple[Denial, ...] = ()
    hints: tuple[Hint, ...] = ()
    memory_peak_bytes: int = 0


class SandboxRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The file SANDBOX of the folder of a run: facts about a sandbox. image: the digest of its image, or None.

    until_unix_ms: when its lifetime ends. left_out: one denial for each reason why entries of its folders were not
    copied in.
    """

    name: str
    tags: dict[str, str]
    opened_unix_ms: int
    until_unix_ms: int
    backend: str
    image: str | None
    left_out: tuple[Denial, ...] = ()


def record_of(run: str) -> SandboxRecord | None:
    """Return the record of a sandbox, or None if it has none."""
    try:
        return msgspec.json.decode((all_runs() / run / SANDBOX).read_bytes(), type=prepared(SandboxRecord))
    except (OSError, msgspec.MsgspecError):
        return None


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
        record = record_of(self.run)
        return () if record is None else record.left_out

    @abstractmethod
    def start(self, given: CommandStart, *, service: str = "") -> Command:
        """Start a command. Raises SandboxError if it cannot be started, the sandbox is closed or the call is wrong."""

    @abstractmethod
    def file_server(self) -> FileServer:
        """Start a file server. Raises SandboxError if the sandbox is closed."""

    @abstractmethod
    def command(self, number: int) -> Command | None:
        """Return a command that has not been waited for, or None."""

    def forget(self, command: Command) -> None:  # noqa: B027 - most sandboxes have nothing to drop
        """Drop a service of the agent that has ended: it is no command of the caller."""

    @abstractmethod
    def ending(self, command: Command) -> CommandEnd:
        """Return how a command ended. `Command.ending` calls this once."""

    @abstractmethod
    def at_end(self, call: Callable[[], object]) -> None:
        """Call *call* when the sandbox ends. Raises BackendError if it has ended."""

    @abstractmethod
    def changes(self) -> Diff:
        """Return what has changed in folders of the host so far. Raises SandboxError."""

    @abstractmethod
    def extend(self, lifetime_s: float) -> None:
        """Let the sandbox last for lifetime_s seconds from now. Raises BackendError."""

    @abstractmethod
    def finish(self, choice: ChangesChoice) -> Result:
        """End all commands, close the sandbox, and apply, keep or discard its changes. A second call does nothing."""

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


class Command:
    """A command of an open sandbox. Thread-safe. wall_ms: the limit of its time, or None."""

    def __init__(
        self, sandbox: AnySandbox, execution: Execution, inboxes: tuple[Inbox, Inbox], wall_ms: int | None
    ) -> None:
        self.execution = execution
        self.wall_ms = wall_ms
        self.began_at = time.monotonic()
        self._sandbox = sandbox
        self._session = sandbox.session
        self._inboxes: dict[StreamName, Inbox] = {"stdout": inboxes[0], "stderr": inboxes[1]}
        self._unread: dict[StreamName, bytes] = {"stdout": b"", "stderr": b""}
        self.kept: Any = None  # what `library/processes` has collected of the output
        self._ending_lock = threading.Lock()
        self._ending: CommandEnd | None = None

    @property
    def id(self) -> int:
        """The number of the command in its sandbox."""
        return self.execution.order.id

    @property
    def ended(self) -> bool:
        """Whether the command has ended. Output may still wait to be read."""
        return self.execution.ended

    def wait(
        self, within_s: float | None = None, *, output: Sequence[StreamName] = (), given_up: Callable[[], bool] = _never
    ) -> bool:
        """Wait until the command has ended, or one of the streams *output* can be read. Return False after *within_s*.

        given_up: whether nobody waits any more; call `wake` once it returns True. Raises BackendError if
        the sandbox ends first.
        """

        def due() -> bool:
            arrived = (self._unread[stream] or self._inboxes[stream].waiting for stream in output)
            return self.ended or given_up() or any(arrived)

        self._sandbox.require_own_process()
        if self._session.until(due, within_s):
            return not given_up()
        if self._session.over:
            raise self._sandbox.gone()
        return False

    def read(self, stream: StreamName) -> bytes:
        """Return what has arrived on a stream since the last call."""
        unread, self._unread[stream] = self._unread[stream], b""
        return unread + self._session.read(self.execution, self._inboxes[stream], _STREAMS[stream])

    def unread(self, stream: StreamName, data: bytes) -> None:
        """Have the next call of `read` return *data* first."""
        self._unread[stream] = data + self._unread[stream]

    def next_pieces(
        self, given_up: Callable[[], bool] = _never, within_s: float | None = None
    ) -> tuple[bool, list[tuple[StreamName, bytes]]]:
        """Wait for output or the end of the command. Return whether there will be no more output, and the output.

        Raises BackendError if the sandbox ends first.
        """
        self.wait(within_s, output=tuple(self._inboxes), given_up=given_up)
        ended = self.ended or given_up()
        return ended, [(stream, data) for stream in self._inboxes if (data := self.read(stream))]

    def tail(self) -> bytes:
        """Return the ends of both streams, as they have arrived."""
        return b"\n".join(inbox.tail for inbox in self._inboxes.values() if inbox.tail)

    def wake(self) -> None:
        """Have all threads that wait look whether they still should."""
        self._session.wake()

    def feed(self, data: bytes) -> None:
        """Queue input without waiting."""
        self._session.write(self.execution, data)

    def write(self, data: bytes) -> None:
        """Send input, and wait while much of it is on its way.

        Raises BrokenPipeError if the command has ended, and BackendError if the sandbox has.
        """
        self._sandbox.require_open()
        if not self.ended:
            self.feed(data)
            if not self._session.until(lambda: self.execution.has_room() or self.ended):
                raise self._sandbox.gone()
        if self.ended:
            raise BrokenPipeError(errno.EPIPE, "the command has ended")

    def end_input(self) -> None:
        """End the input."""
        self._session.end_input(self.execution)

    def stop(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the command, if it has not ended. SIGKILL goes to all its processes."""
        self._session.stop(self.execution, number)

    def resize(self, rows: int, columns: int) -> None:
        """Change the size of the command's terminal."""
        self._session.resize(self.execution, rows, columns)

    def ending(self) -> CommandEnd:
        """Return how the command ended, once it has. Raises BackendError if the sandbox ended first."""
        with self._ending_lock:
            if self._ending is None:
                self._ending = self._sandbox.ending(self)
            return self._ending
