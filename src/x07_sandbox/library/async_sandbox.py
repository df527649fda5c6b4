"""Sandboxes for callers that use asyncio: the methods of `Sandbox`, to be awaited."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Self, Unpack

from x07_sandbox.errors import UsageError
from x07_sandbox.library.awaited import Awaited, awaited, in_thread
from x07_sandbox.library.sandbox import Sandbox
from x07_sandbox.sessions.command import Process

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from types import TracebackType

    from x07_sandbox.host.waiting import Cancel
    from x07_sandbox.library.files import AsyncFiles
    from x07_sandbox.library.sandbox import ForkOptions, SandboxOptions, StartOptions
    from x07_sandbox.policy.denials import Denial
    from x07_sandbox.reports.sandboxes import SandboxInfo
    from x07_sandbox.sessions.command import StreamName
    from x07_sandbox.sessions.result import Result


_ON_OUTPUT = "*on_output* is called in the thread of the event loop."


class AsyncSandbox(Awaited[Sandbox]):
    """A virtual machine that stays open for many commands, for asyncio.

        async with AsyncSandbox(workdir="project") as sandbox:
            done = await sandbox.shell("make test", timeout_s=60)

    Its arguments and methods are those of `Sandbox`. It is opened by `async with`, or by `open`. If a task is cancelled
    while it awaits a command, the command is killed and the sandbox stays open.
    """

    def __init__(self, **options: Unpack[SandboxOptions]) -> None:
        """Describe a sandbox. options: see `Sandbox`."""
        self._options = options
        self._opened: Sandbox | None = None

    async def open(self) -> Self:
        """Open the sandbox. Raises SandboxError."""
        if self._opened is not None:
            raise UsageError("cannot open the sandbox", "it was opened before", "Make a new one")
        return await self._open(lambda cancel: Sandbox(cancel=cancel, **self._options))

    async def _open(self, work: Callable[[Cancel], Sandbox]) -> Self:
        from x07_sandbox.host.waiting import Cancel

        cancel = Cancel()
        opened: list[Sandbox] = []
        try:
            await in_thread(lambda: opened.append(work(cancel)), cancel)
        except BaseException:
            for one in opened:  # the cancellation came too late to prevent it
                await in_thread(partial(one.close, "discard"))
            raise
        self._opened = opened[0]
        return self

    @classmethod
    async def create(cls, *, name: str = "", **options: Unpack[SandboxOptions]) -> Self:
        """See `Sandbox.create`."""
        return await cls()._open(lambda cancel: Sandbox._created(name, options, cancel))  # noqa: SLF001 - one idea

    @classmethod
    async def get_or_create(cls, name: str, **options: Unpack[SandboxOptions]) -> Self:
        """See `Sandbox.get_or_create`."""
        return await cls()._open(lambda cancel: Sandbox._created(name, options, cancel, find=True))  # noqa: SLF001 - one idea

    @classmethod
    async def connect(cls, id: str) -> Self:  # noqa: A002 - as the property
        """See `Sandbox.connect`."""
        found = cls()
        found._opened = await in_thread(lambda: Sandbox.connect(id))
        return found

    @staticmethod
    async def list(tags: Mapping[str, str] | None = None) -> Sequence[SandboxInfo]:
        """See `Sandbox.list`."""
        return await in_thread(lambda: Sandbox.list(tags))

    # These two are quick.
    max_open = staticmethod(Sandbox.max_open)
    images = staticmethod(Sandbox.images)

    @property
    def id(self) -> str:
        """See `Sandbox.id`."""
        return self._target.id

    @property
    def alive(self) -> bool:
        """See `Sandbox.alive`."""
        return self._opened is not None and self._opened.alive

    @property
    def left_out(self) -> tuple[Denial, ...]:
        """See `Sandbox.left_out`."""
        return self._target.left_out

    @property
    def result(self) -> Result | None:
        """See `Sandbox.result`."""
        return None if self._opened is None else self._opened.result

    @property
    def files(self) -> AsyncFiles:
        """The files of the sandbox."""
        from x07_sandbox.library.files import AsyncFiles

        return AsyncFiles(self._target.files)

    exec = awaited(Sandbox.exec, _ON_OUTPUT)
    shell = awaited(Sandbox.shell, _ON_OUTPUT)
    upload = awaited(Sandbox.upload)
    download = awaited(Sandbox.download)
    forward = awaited(Sandbox.forward)
    wait_for_port = awaited(Sandbox.wait_for_port)
    changes = awaited(Sandbox.changes)
    snapshot = awaited(Sandbox.snapshot)
    checkpoint = awaited(Sandbox.checkpoint)
    rollback = awaited(Sandbox.rollback)
    pause = awaited(Sandbox.pause)
    disconnect = awaited(Sandbox.disconnect)
    extend = awaited(Sandbox.extend)
    close = awaited(Sandbox.close, "If the task is cancelled, the sandbox is closed nevertheless.")
    kill = awaited(Sandbox.kill)

    async def start(self, argv: Sequence[str | os.PathLike[str]], **options: Unpack[StartOptions]) -> AsyncProcess:
        """See `Sandbox.start`. If the task is cancelled meanwhile, the command is killed."""
        started: list[Process] = []
        try:
            await in_thread(lambda: started.append(self._target.start(argv, **options)))
        except BaseException:
            for process in started:
                await in_thread(process.kill)
            raise
        return AsyncProcess(started[0])

    async def fork(self, count: int = 1, **options: Unpack[ForkOptions]) -> Sequence[Self]:
        """See `Sandbox.fork`. If the task is cancelled meanwhile, the forks are closed."""
        opened: list[Sandbox] = []
        try:
            await in_thread(lambda: opened.extend(self._target.fork(count, **options)))
        except BaseException:
            for one in opened:
                await in_thread(partial(one.close, "discard"))
            raise
        return [await type(self)()._open(partial(_given, one)) for one in opened]  # noqa: SLF001 - of this class

    async def process(self, number: int) -> AsyncProcess:
        """See `Sandbox.process`."""
        return AsyncProcess(await in_thread(lambda: self._target.process(number)))

    async def __aenter__(self) -> Self:
        return await self.open() if self._opened is None else self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await in_thread(lambda: self._target.__exit__(kind, value, trace))

    @property
    def _target(self) -> Sandbox:
        if self._opened is None:
            raise UsageError("cannot use the sandbox", "it is not open", "Use async with, or await open()")
        return self._opened


def _given(opened: Sandbox, _cancel: Cancel) -> Sandbox:
    return opened


class AsyncProcess(Awaited[Process]):
    """A command that runs in a sandbox, for asyncio. Its methods are those of `Process`."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @property
    def _target(self) -> Process:
        return self._process

    @property
    def id(self) -> int:
        """See `Process.id`."""
        return self._process.id

    write = awaited(Process.write)
    close_stdin = awaited(Process.close_stdin)
    read = awaited(Process.read)
    read_until = awaited(Process.read_until)
    poll = awaited(Process.poll)
    wait = awaited(Process.wait)
    signal = awaited(Process.signal)
    kill = awaited(Process.kill)
    resize = awaited(Process.resize)
    _next_pieces = awaited(Process.next_pieces)

    async def __aiter__(self) -> AsyncIterator[tuple[StreamName, bytes]]:
        ended = False
        while not ended:
            ended, pieces = await self._next_pieces()
            for piece in pieces:
                yield piece
