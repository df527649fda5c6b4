"""Commands in a sandbox, as callers from Python see them: how they ended, and processes that run."""

from __future__ import annotations

import math
import signal
import time
from typing import TYPE_CHECKING, Final, Literal, TypedDict

import msgspec

from x07_sandbox.errors import ArgumentError, SandboxError, UsageError
from x07_sandbox.host.settings import OUTPUT_MAX_BYTES
from x07_sandbox.policy.denials import Denial, Hint, Outcome

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping

    from x07_sandbox.sessions.command import Command, StreamName

Keep = Literal["head", "tail", "both"]

KEEPS: Final = ("head", "tail", "both")
_STREAMS: Final[tuple[Literal["stdout", "stderr"], ...]] = ("stdout", "stderr")


class ExecOptions(TypedDict, total=False):
    """The keyword arguments of `Sandbox.exec`."""

    input: bytes
    cwd: str | os.PathLike[str] | None
    env: Mapping[str, str] | None
    timeout_s: float | None
    merge: bool
    max_output_bytes: int
    keep: Keep
    on_output: Callable[[StreamName, bytes], object] | None
    check: bool


class StartOptions(TypedDict, total=False):
    """The keyword arguments of `Sandbox.start`."""

    cwd: str | os.PathLike[str] | None
    env: Mapping[str, str] | None
    timeout_s: float | None
    merge: bool
    tty: bool
    detach: bool


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
    stdout: bytes
    stderr: bytes
    truncated: bool
    wall_ms: float
    cpu_ms: float
    memory_peak_bytes: int
    denials: tuple[Denial, ...]
    hints: tuple[Hint, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the command exited with status 0."""
        return self.outcome == "ok"

    def _repr_html_(self) -> str:
        """Return the same as HTML, which notebooks show."""
        from x07_sandbox.sessions.html import command_fragment

        told = {name: msgspec.to_builtins(getattr(self, name)) for name in ("denials", "hints")}
        return command_fragment(msgspec.structs.asdict(self) | told)


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

    def __init__(self, command: Command, given_up: Callable[[], bool] = lambda: False) -> None:
        self._command = command
        self._given_up = given_up

    @property
    def id(self) -> int:
        """The number of the command in its sandbox."""
        return self._command.id

    def feed(self, data: bytes) -> None:
        """Queue bytes for the standard input, without waiting until the command takes them."""
        self._command.feed(data)

    def write(self, data: bytes) -> None:
        """Send bytes to the standard input, and wait while much of it is on its way.

        Raises BrokenPipeError if the command has ended, and SandboxError if the sandbox has.
        """
        self._command.write(data)

    def close_stdin(self) -> None:
        """End the standard input."""
        self._command.end_input()

    def read(self, stream: StreamName = "stdout", timeout_s: float | None = None) -> bytes:
        """Return what has arrived on a stream; wait for at least one byte. Return b"" once the command has ended.

        Raises TimeoutError after *timeout_s*, and SandboxError if the sandbox has ended.
        """
        if stream not in _STREAMS:
            raise bad_value("stream", stream, "'stdout' or 'stderr'")
        deadline = _deadline(timeout_s)
        while not (data := self._command.read(stream)) and not self._command.ended:
            left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._command.wait(left_s, output=(stream,), given_up=self._given_up):
                raise TimeoutError(f"no output within {timeout_s} s")
        data = data or self._command.read(stream)
        if self._given_up():  # nobody takes it
            self._command.unread(stream, data)
        return data

    def __iter__(self) -> Iterator[tuple[StreamName, bytes]]:
        ended = False
        while not ended:
            ended, pieces = self.next_pieces()
            yield from pieces

    def next_pieces(self) -> tuple[bool, list[tuple[StreamName, bytes]]]:
        """Wait for output or the end of the command. Return whether that was the end, and the output."""
        return self._command.next_pieces(self._given_up)

    def for_caller(self, given_up: Callable[[], bool]) -> Process:
        """Return the same process for a caller that stops waiting once *given_up* returns True; call `wake` then."""
        return Process(self._command, given_up)

    def wake(self) -> None:
        """Have all callers look whether they still wait."""
        self._command.wake()

    def poll(self) -> Ended | None:
        """Return how the command ended, or None while it runs."""
        return self.wait() if self._command.ended else None

    def wait(self, timeout_s: float | None = None) -> Ended:
        """Wait for the end of the command, and return how it ended, with the output that was not read.

        Raises TimeoutError if it still runs after *timeout_s*, and SandboxError if the sandbox has ended.
        """
        return self.collect(OUTPUT_MAX_BYTES, "head", None, timeout_s)

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
        if self._command.kept is None:
            self._command.kept = {name: Kept(most, keep) for name in _STREAMS}
        kept: dict[StreamName, Kept] = self._command.kept
        while not ended:
            left_s = None if deadline is None else deadline - time.monotonic()
            if left_s is not None and left_s <= 0:
                raise TimeoutError(f"command {self.id} still runs after {timeout_s} s")
            ended, pieces = self._command.next_pieces(self._given_up, left_s)
            for name, data in pieces:
                kept[name].take(data)
                if on_output is not None:
                    on_output(name, data)
        if not self._command.ended:
            raise TimeoutError("nobody waits for the command any more")
        from x07_sandbox.options import keyword

        end = self._command.ending()
        ending = end.verdict
        return Ended(
            id=self.id,
            outcome=ending.outcome,
            reason_code=ending.code,
            reason=ending.reason_for(keyword),
            x07_exit_code=ending.x07_exit_code,
            exit_code=ending.exit_code,
            signal=ending.signal,
            stdout=kept["stdout"].data(),
            stderr=kept["stderr"].data(),
            truncated=any(one.truncated for one in kept.values()),
            wall_ms=end.report.wall_ms,
            cpu_ms=end.report.cpu_ms,
            memory_peak_bytes=end.memory_peak_bytes,
            denials=end.denials,
            hints=end.hints,
        )

    def signal(self, number: int) -> None:
        """Send a signal to the command, if it has not ended. SIGKILL goes to all its processes."""
        self._command.stop(_whole("number", number, 1, 64))

    def kill(self) -> None:
        """Kill all processes of the command, if it has not ended."""
        self._command.stop(signal.SIGKILL)

    def resize(self, rows: int, columns: int) -> None:
        """Change the size of the command's terminal, in characters."""
        self._command.resize(_whole("rows", rows, 1, 65535), _whole("columns", columns, 1, 65535))


def bad_value(name: str, value: object, wanted: str) -> UsageError:
    """Return the error for a wrong value of an argument of a call about a command."""
    return ArgumentError("cannot do this with a command", f"{name} is {value!r}", f"Use {wanted}")


def _whole(name: str, value: int, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise bad_value(name, value, f"a number from {least} to {most}")
    return value


def _deadline(timeout_s: float | None) -> float | None:
    return None if timeout_s is None or math.isinf(timeout_s) else time.monotonic() + timeout_s


def checked(ended: Ended) -> Ended:
    """Return *ended*. Raises SandboxError unless the command succeeded."""
    if ended.ok:
        return ended
    error = SandboxError(f"command {ended.id} ended as {ended.outcome}", ended.reason, "See the result of this error")
    error.result = ended
    raise error
