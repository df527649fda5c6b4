"""A sandbox with several commands, for the checks of behaviours."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from x07_sandbox.backends.base import Fork, Instance, Job, MachineKind, RootPlace
from x07_sandbox.channel.link import Link
from x07_sandbox.channel.messages import CWD, FILES, FREE, Closed, CommandLimits, Exec, Exited, Mount, Room
from x07_sandbox.conformance.harness import ANSWER_S, Bench, BrokenError, expect
from x07_sandbox.host import settings
from x07_sandbox.host.waiting import Caller, Cancel
from x07_sandbox.policy.guest import RAM_CLASSES
from x07_sandbox.records.runs import Claim, new_run_id
from x07_sandbox.sessions.execution import Execution
from x07_sandbox.sessions.files import FileServer
from x07_sandbox.sessions.session import Session
from x07_sandbox.sessions.specs import SessionSpec, opening
from x07_sandbox.sessions.transfers import CommandStreams, InFile, Receivers, Sink, kept_streams, memory_file

if TYPE_CHECKING:
    from x07_sandbox.files.incoming import Incoming

ROOT: Final = "/mnt/root"
_SANDBOX_MS: Final = 900_000
_EMULATED: Final = 4  # how many times as long as usual an emulated CPU may take
_OUTPUT_MAX: Final = 32 * settings.MIB
_ENV: Final = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": CWD, "LANG": "C.UTF-8"}
_LIMITS: Final = CommandLimits(mem_bytes=256 * settings.MIB, tasks=128, cpu_ms=600_000, fds=256, core_bytes=0)
_COUNT: Final = """
import os, sys
mark, count = sys.stdin.buffer.read(), 0
for name in os.listdir("/proc"):
    try: count += mark in open(f"/proc/{name}/cmdline", "rb").read()
    except OSError: pass
print(count)
"""


class _Kept(Sink):
    """Sink that keeps one output stream in memory."""

    def __init__(self, name: str) -> None:
        super().__init__(name, keep_fd=None, live_fd=None, max_bytes=_OUTPUT_MAX)
        self.data = bytearray()

    def take(self, data: bytes) -> int:
        """Keep *data*."""
        self.data += data
        return super().take(data)


class Command(NamedTuple):
    """A command and its standard output."""

    execution: Execution
    output: _Kept

    @property
    def text(self) -> str:
        """The standard output so far."""
        return self.output.data.decode(errors="replace")

    @property
    def exited(self) -> Exited:
        """The guest's report about its end. Raises BrokenError if there is none."""
        if self.execution.exited is None:
            raise BrokenError(f"expected the end of a command, got {self.execution.failed or 'a lost sandbox'}")
        return self.execution.exited

    @property
    def code(self) -> int:
        """The exit code, negative for a signal."""
        return os.waitstatus_to_exitcode(self.exited.wait_status)


class Box:
    """A sandbox in which commands run, until it is closed or its context ends. answer_s: a timeout for each wait."""

    def __init__(
        self,
        session: Session,
        instance: Instance,
        limits: CommandLimits,
        answer_s: float = ANSWER_S,
        kind: MachineKind | None = None,
        last: int = 0,
    ) -> None:
        self.answer_s = answer_s
        self.session = session
        self.instance = instance
        self.limits = limits
        self.kind = kind
        self._last = last

    def start(
        self, *argv: str, stdin: bytes | None = b"", wall_ms: int | None = None, service: str = "", **limits: int
    ) -> Command:
        """Start a command. stdin: None to keep the input open for `Execution.write`."""
        output = _Kept("stdout")
        given = CommandStreams(stdin_fd=None, stdout=output, stderr=_Kept("stderr"), open_input=True)
        order = Exec(self._next(), list(argv), _ENV, CWD, self.limits._replace(**limits), service)
        execution = self.session.execute(order, given, wall_ms)
        if stdin is not None:
            execution.write(stdin)
            execution.end_input()
        return Command(execution, output)

    def sh(self, text: str, *words: str, **how: Any) -> Command:  # noqa: ANN401 - as `start`
        """Start a shell command with the arguments *words*."""
        return self.start("/bin/sh", "-c", text, "sh", *words, **how)

    def python(self, code: str, *words: str, **how: Any) -> Command:  # noqa: ANN401 - as `start`
        """Start a Python program."""
        return self.start("/usr/bin/python3", "-c", code, *words, **how)

    def files(self) -> FileServer:
        """Start a file server."""
        order = Exec(self._next(), [], {}, "/", self.limits, FILES)
        return FileServer(self.session, self.session.execute(order, kept_streams(), None))

    def _next(self) -> int:
        self._last += 1
        return self._last

    def until(self, what: str, done: Callable[[], bool]) -> None:
        """Wait until *done* returns True. Raises BrokenError after a timeout, or if the sandbox is lost."""
        if not self.session.until(done, self.answer_s):
            raise BrokenError(f"expected {what}, got {'a lost sandbox' if self.session.over else 'none in time'}")

    def started(self, *commands: Command) -> None:
        """Wait until commands run."""
        self.until("the start of commands", lambda: not any(one.execution.starting for one in commands))

    def says(self, command: Command, text: str) -> None:
        """Wait until a command has written *text*."""
        self.until(f"the output {text!r}", lambda: text in command.text)

    def code(self, command: Command) -> int:
        """Wait for the end of a command and return its exit code, negative for a signal."""
        self.until("the end of a command", lambda: command.execution.ended)
        return command.code

    def output(self, command: Command) -> str:
        """Return the output of a command once it has ended. Raises BrokenError if it did not succeed."""
        expect("exit code of a command", 0, self.code(command))
        return command.text

    def marked(self, mark: str) -> int:
        """Wait until no process in the sandbox has *mark* among its arguments. Return how many do after a timeout."""
        deadline = time.monotonic() + self.answer_s
        while (count := int(self.output(self.python(_COUNT, stdin=mark.encode())))) and time.monotonic() < deadline:
            pass
        return count

    def close(self, changes: Incoming | None = None) -> Closed | None:
        """Close the sandbox, and take its changes."""
        return self.session.close(Receivers(changes=changes))


@contextlib.contextmanager
def opened(bench: Bench, root: bytes = b"", *, guest_root: bool = False, **limits: int) -> Iterator[Box]:
    """Open a sandbox. root: the tree (channel/trees) of a write root at ROOT. limits: of all commands, and of each.

    guest_root: whether programs are root inside.
    """
    most = _LIMITS._replace(**limits)
    mounts = [Mount(tree=0, sub="", at=ROOT, write=True, changes=True)] if root else []
    room = Room(settings.MIB, settings.MIB)
    with contextlib.ExitStack() as stack:
        files = [InFile(path="", mode=0o755, kind="tree", fd=memory_file(root, stack), size=len(root))] if root else []
        spec = SessionSpec(
            name="run",
            opening=opening(FREE, most, files, mounts, None, room, out_writable=False, root=guest_root),
            order=Exec(0, [], _ENV, CWD, most),
            files=tuple(files),
            receivers=Receivers(),
            wall_ms=_SANDBOX_MS,
            ram_bytes=RAM_CLASSES[0],
            places=(RootPlace(at=ROOT, write=True),) if root else (),
        )
        cancel = stack.enter_context(contextlib.closing(Cancel()))
        claim = Claim(run_id=new_run_id(), phase=spec.name, wall_ms=spec.wall_ms)
        instance = stack.enter_context(bench.backend.start(spec.job(claim, bench.image, Caller(cancel=cancel))))
        session = Session(instance, cancel, spec.opening, spec.files)
        kind = spec.kind(bench.image)
        yield Box(session, instance, most, ANSWER_S * (_EMULATED if bench.features.emulated else 1), kind)


@contextlib.contextmanager
def forked(bench: Bench, box: Box, command: Command) -> Iterator[tuple[Box, Command]]:
    """Open a fork of a sandbox, and return what its *command* is there. The backend must have snapshots."""
    snapshots, number = bench.backend.snapshots, command.execution.order.id
    assert snapshots is not None  # else the behaviour is a gap
    assert box.kind is not None  # `opened` has set it
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(snapshots.folder()).path
        with snapshots.capture(box.instance, box.kind, folder) as capture:
            try:
                box.session.hold()
                state, _ = box.session.unended()
                capture.take()
            finally:
                box.session.go_on()
        cancel = stack.enter_context(contextlib.closing(Cancel()))
        claim = Claim(run_id=new_run_id(), phase="run", wall_ms=_SANDBOX_MS)
        fork = Fork(folder, Link.resumed(state))
        job = Job(claim=claim, kind=box.kind, caller=Caller(cancel=cancel), fork=fork)
        instance = stack.enter_context(bench.backend.start(job))
        output = _Kept("stdout")
        given = CommandStreams(stdin_fd=None, stdout=output, stderr=_Kept("stderr"), open_input=True)
        execution = Execution(command.execution.order, given, None)
        execution.times_ms["started"] = 0.0
        execution.started()
        session = Session(instance, cancel, None, adopted=[execution])
        yield Box(session, instance, box.limits, box.answer_s, box.kind, number), Command(execution, output)
