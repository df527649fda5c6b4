"""One command as the host sees it: its input and output, its deadline, and the evidence about its end."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Literal

import msgspec

from x07_sandbox.channel.link import COMMANDS_MAX, DATA_MAX, Stream
from x07_sandbox.channel.messages import DENIED_MAX, Closed, CommandLimits, Denied, Exec, Exited, Failed
from x07_sandbox.errors import PeerError, UsageError
from x07_sandbox.host.waiting import Deadline, input_poll, read_deadline
from x07_sandbox.policy.outcomes import Evidence, Stage
from x07_sandbox.sessions.transfers import CommandStreams, Inbox

_TERM: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}")
FILL: Final = 1024 * 1024  # limit for bytes queued for the guest
CONNECTIONS_MAX: Final = COMMANDS_MAX // 2  # at the same time, so that commands always find room


def terminal_kind() -> str:
    """Return TERM of this process if it is a plain name, else a kind that nearly every image knows."""
    kind = os.environ.get("TERM", "")
    return kind if _TERM.fullmatch(kind) else "xterm-256color"


def order(
    argv: Sequence[str],
    env: Mapping[str, str] = MappingProxyType({}),
    cwd: str = "",
    **how: Any,  # noqa: ANN401 - fields
) -> Exec:
    """Return a command for `AnySandbox.start`, which sets its id and its limits. how: further fields of `Exec`.

    Raises UsageError if a word, a variable or the folder is not a string.
    """
    named = [(f"argument {number}", word) for number, word in enumerate(argv)]
    named += [(f"the variable {name!r}", text) for name, value in env.items() for text in (name, value)]
    for which, text in [*named, ("the folder", cwd)]:
        if not isinstance(text, str):
            raise UsageError("cannot run the command", f"{which} is not a string", "Pass strings")
    return Exec(0, [*argv], dict(env), cwd, CommandLimits(0, 0, 0, 0, 0), **how)


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """The facts that are known after a command.

    exited, closed, denied: messages of the guest; None or () without them. times_ms: milliseconds from the moment the
    instance was released to run until the events `hello`, `seeded`, `started`, `exited`, `end`.
    input_sha256: digest of the input; None if the input was not read to its end.
    input_problem: why the input could not be read to its end; empty if there was no problem.
    """

    evidence: Evidence
    exited: Exited | None = None
    closed: Closed | None = None
    denied: tuple[Denied, ...] = ()
    times_ms: dict[str, float] = {}
    input_sha256: str | None = None
    input_problem: str = ""


class Limit:
    """A deadline that allows for delays of this process: data that arrived in time is read first."""

    def __init__(self, seconds: float) -> None:
        self.set(seconds)

    def set(self, seconds: float) -> None:
        """Set the deadline anew."""
        self._deadline = Deadline.after(seconds)
        self._late: Deadline | None = None

    def left_s(self) -> float:
        """Return the seconds left."""
        return self._deadline.left_s()

    def is_up(self, *fds: int) -> bool:
        """Return whether the deadline has passed and none of *fds* has anything to read.

        Pending events are handled first: this process may be late, because of Ctrl-Z or a busy host.
        """
        if not self._deadline.passed():
            self._late = None
            return False
        # If this process was stopped, the guest had to wait too, and needs time to send the rest.
        no_wait = self._late is None and not self._deadline.missed_while_stopped()
        self._late = self._late or read_deadline(self._deadline)
        wait_s = 0.0 if no_wait else self._late.left_s()
        return self._late.passed() or not input_poll(*fds).poll(wait_s * 1000)


class Execution:
    """A command that was sent to the guest. Each needs a new object. wall_ms: for how long it may run, or None.

    sent_ms: when it was sent. limit: its deadline while it runs. stage: SETUP, RUN or COLLECT. seen: fields of
    `Evidence`. times_ms: when it started and ended.
    """

    def __init__(self, order: Exec, streams: CommandStreams, wall_ms: int | None, sent_ms: float = 0.0) -> None:
        self.order = order
        self.streams = streams
        self.limit: Limit | None = None
        self.stage = Stage.SETUP
        self.seen: dict[str, Any] = {}
        self.exited: Exited | None = None
        self.failed: Failed | None = None
        self.times_ms: dict[str, float] = {}
        self.denied: list[Denied] = []
        self.asked_to_stop = False
        self.cut_off = False  # whether the session was closed while it ran
        self.rolled_back = False  # whether the sandbox went back to a moment before its start
        self.replaced = False  # whether the sandbox went back to another moment, from which another object goes on
        self.stdin = 0  # number of the input's stream
        self.outputs: dict[Stream, int] = {}  # numbers of the output's streams
        self.input_problem = ""
        self.input_done = streams.stdin_fd is None and not streams.open_input
        self.unanswered = False  # whether input was given since the last output: a file server has not answered
        self._input = bytearray()
        self._input_hash = hashlib.sha256()
        self.wall_ms = wall_ms
        self._sent_ms = sent_ms
        self._sinks = {Stream.STDOUT: streams.stdout, Stream.STDERR: streams.stderr}

    def inbox(self, name: Literal["stdout", "stderr"]) -> Inbox:
        """Return what keeps a stream of a command whose streams are kept in memory."""
        found = self.streams.stdout if name == "stdout" else self.streams.stderr
        assert isinstance(found, Inbox)  # such streams are made by `kept_streams`
        return found

    @property
    def ended(self) -> bool:
        """Whether the command and its output have ended, or it could not be started."""
        return self.exited is not None or self.failed is not None or self.rolled_back

    @property
    def starting(self) -> bool:
        """Whether the command has neither started nor failed."""
        return self.stage is Stage.SETUP and not self.ended

    def started(self) -> None:
        """Note that the command was executed, and set its deadline."""
        self.streams.on_started()
        self.stage = Stage.RUN
        if self.wall_ms is not None and not self.asked_to_stop:
            self.limit = Limit(self.wall_ms / 1000)

    def ran(self, ended_ms: float, wall_ms: float) -> None:
        """Note when the command ended, and for how long it ran by the guest's clock."""
        # A busy host may read STARTED late, even together with EXITED. No command starts before it is sent.
        began_ms = max(self._sent_ms, ended_ms - wall_ms)
        self.times_ms |= {"started": round(min(self.times_ms["started"], began_ms), 1), "exited": ended_ms}

    def deny(self, denied: Denied) -> None:
        """Keep a denial. Raises PeerError."""
        if len(self.denied) >= DENIED_MAX:
            raise PeerError("bad DENIED message", f"there are more than {DENIED_MAX}")
        self.denied.append(denied)

    def end(self, exited: Exited) -> None:
        """Keep the guest's report."""
        self.exited, self.limit = exited, None
        names = ("wait_status", "oom_kills", "cpu_exceeded", "cpu_us")
        self.seen |= {name: getattr(exited, name) for name in names}
        if self.asked_to_stop:
            self.seen["stopped"] = exited.stopped
        else:
            self.stage = Stage.COLLECT

    def fail(self, failed: Failed) -> None:
        """Keep the guest's report that the command could not be started."""
        self.failed, self.limit = failed, None
        self.seen |= {"setup_failure": f"{failed.stage}: {failed.message}", "exec_errno": failed.errno}

    def take_output(self, stream: Stream, data: bytes) -> int:
        """Take output, and return how many bytes of it were processed."""
        self.unanswered = False
        return self._sinks[stream].take(data)

    def take_no_more(self) -> list[tuple[Stream, int]]:
        """Have the sinks drop further output. Return how many bytes more the guest may send on each stream."""
        return [(stream, sink.take_no_more()) for stream, sink in self._sinks.items()]

    def overflow(self) -> dict[str, object]:
        """Return the evidence that an output is over its limit, or {}."""
        for sink in self._sinks.values():
            if sink.overflow:
                return {"output_overflow": sink.name, "output_max_bytes": sink.max_bytes}
        return {}

    def progress_fds(self) -> list[int]:
        """Return the descriptors that become ready when a reader of the output takes more."""
        return [sink.progress_fd for sink in self._sinks.values() if sink.progress_fd is not None]

    def pump(self, fd: int) -> tuple[Stream, int] | None:
        """Count the output that was written since *fd* became ready.

        Return the stream and the number of bytes, or None if *fd* belongs to another command.
        """
        for stream, sink in self._sinks.items():
            if fd == sink.progress_fd:
                return stream, sink.pump()
        return None

    def wants_input(self) -> bool:
        """Return whether more input should be read."""
        return self.streams.stdin_fd is not None and not self.input_done and not self._input

    def write(self, data: bytes) -> None:
        """Queue *data* as input, if the streams have `open_input`."""
        self.unanswered = True
        self._input += data
        self._input_hash.update(data)

    def end_input(self) -> None:
        """End the input once all of it has been sent."""
        self.input_done = True

    def read_input(self) -> None:
        """Read input once."""
        fd = self.streams.stdin_fd
        assert fd is not None  # `wants_input`
        try:
            data = os.read(fd, DATA_MAX)
        except BlockingIOError:
            return
        except OSError as exc:
            data = b""
            if not os.isatty(fd):  # for a terminal it is a hangup, which is a normal end
                self.input_problem = exc.strerror or str(exc)
        self._input += data
        self._input_hash.update(data)
        self.input_done = not data

    def has_room(self) -> bool:
        """Return whether little of the input waits to be sent."""
        return len(self._input) < FILL

    def waiting_input(self) -> bytearray:
        """Return the input that was read and not yet sent; the caller removes what it sends."""
        return self._input

    def facts(self, closed: Closed | None, times_ms: dict[str, float], end_ms: float, **seen: object) -> Facts:
        """Return what is known. times_ms, end_ms, seen: times of the session, and fields of `Evidence` about it."""
        return Facts(
            evidence=Evidence(stage=self.stage, **{**self.seen, **seen}),
            exited=self.exited,
            closed=closed,
            denied=tuple(self.denied),
            times_ms={**times_ms, **self.times_ms, "end": end_ms},
            input_sha256=self._input_hash.hexdigest() if self.input_done and not self.input_problem else None,
            input_problem=self.input_problem,
        )
