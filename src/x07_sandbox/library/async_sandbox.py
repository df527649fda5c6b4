"""Sandboxes for callers that use asyncio: the methods of `Sandbox`, to be awaited."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

from x07_sandbox.errors import UsageError
from x07_sandbox.library.processes import Process
from x07_sandbox.library.sandbox import Sandbox

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from types import TracebackType

    from x07_sandbox.library.file_info import FileInfo
    from x07_sandbox.library.files import Files
    from x07_sandbox.library.processes import Ended, ExecOptions, StartOptions
    from x07_sandbox.library.sandbox import SandboxOptions
    from x07_sandbox.policy.denials import Denial
    from x07_sandbox.reports.sandboxes import SandboxInfo
    from x07_sandbox.sessions.command import StreamName
    from x07_sandbox.sessions.request import ChangesChoice
    from x07_sandbox.sessions.result import Diff, Result

_T = TypeVar("_T")


def _nothing() -> None:
    pass


async def in_thread(work: Callable[[], _T], cancel: Callable[[], object]) -> _T:
    """See `library/in_thread`, which imports asyncio."""
    from x07_sandbox.library.in_thread import in_thread as real

    return await real(work, cancel)


class AsyncSandbox:
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
        from x07_sandbox.host.waiting import Cancel

        if self._opened is not None:
            raise UsageError("cannot open the sandbox", "it was opened before", "Make a new one")
        cancel = Cancel()
        opened: list[Sandbox] = []
        try:
            await in_thread(lambda: opened.append(Sandbox(cancel=cancel, **self._options)), cancel)
        except BaseException:
            for one in opened:  # the cancellation came too late to prevent it
                await in_thread(partial(one.close, "discard"), _nothing)
            raise
        self._opened = opened[0]
        return self

    @classmethod
    async def create(cls, *, name: str = "", **options: Unpack[SandboxOptions]) -> Self:
        """See `Sandbox.create`."""
        return await cls._around(lambda: Sandbox.create(name=name, **options))

    @classmethod
    async def connect(cls, id: str) -> Self:  # noqa: A002 - as the property
        """See `Sandbox.connect`."""
        return await cls._around(lambda: Sandbox.connect(id))

    @classmethod
    async def _around(cls, call: Callable[[], Sandbox]) -> Self:
        found = cls()
        found._opened = await in_thread(call, _nothing)
        return found

    @staticmethod
    async def list(tags: Mapping[str, str] | None = None) -> Sequence[SandboxInfo]:
        """See `Sandbox.list`."""
        return await in_thread(lambda: Sandbox.list(tags), _nothing)

    # These two are quick.
    max_open = staticmethod(Sandbox.max_open)
    images = staticmethod(Sandbox.images)

    @property
    def id(self) -> str:
        """See `Sandbox.id`."""
        return self._sandbox.id

    @property
    def alive(self) -> bool:
        """See `Sandbox.alive`."""
        return self._opened is not None and self._opened.alive

    @property
    def left_out(self) -> tuple[Denial, ...]:
        """See `Sandbox.left_out`."""
        return self._sandbox.left_out

    @property
    def result(self) -> Result | None:
        """See `Sandbox.result`."""
        return None if self._opened is None else self._opened.result

    @property
    def files(self) -> AsyncFiles:
        """The files of the sandbox."""
        return AsyncFiles(self._sandbox.files)

    async def exec(self, argv: Sequence[str | os.PathLike[str]], **options: Unpack[ExecOptions]) -> Ended:
        """See `Sandbox.exec`. *on_output* is called in the thread of the event loop."""
        return await self._run(partial(self._sandbox.exec, argv), options)

    async def shell(self, text: str, **options: Unpack[ExecOptions]) -> Ended:
        """See `Sandbox.shell`. *on_output* is called in the thread of the event loop."""
        return await self._run(partial(self._sandbox.shell, text), options)

    async def start(self, argv: Sequence[str | os.PathLike[str]], **options: Unpack[StartOptions]) -> AsyncProcess:
        """See `Sandbox.start`."""
        started: list[Process] = []

        def kill() -> None:
            for process in started:
                process.kill()

        try:
            await in_thread(lambda: started.append(self._sandbox.start(argv, **options)), kill)
        except BaseException:
            kill()  # it may have started after the cancellation
            raise
        return AsyncProcess(started[0])

    def process(self, number: int) -> AsyncProcess:
        """See `Sandbox.process`."""
        return AsyncProcess(self._sandbox.process(number))

    async def upload(
        self, local: str | os.PathLike[str], path: str | os.PathLike[str], *, timeout_s: float | None = None
    ) -> None:
        """See `Sandbox.upload`."""
        await self.files.upload(local, path, timeout_s=timeout_s)

    async def download(
        self, path: str | os.PathLike[str], local: str | os.PathLike[str], *, timeout_s: float | None = None
    ) -> None:
        """See `Sandbox.download`."""
        await self.files.download(path, local, timeout_s=timeout_s)

    def forward(self, port: int, *, unix: str | os.PathLike[str] | None = None) -> tuple[str, int]:
        """See `Sandbox.forward`."""
        return self._sandbox.forward(port, unix=unix)

    async def changes(self) -> Diff:
        """See `Sandbox.changes`."""
        return await in_thread(self._sandbox.changes, _nothing)

    def disconnect(self) -> None:
        """See `Sandbox.disconnect`."""
        self._sandbox.disconnect()

    def extend(self, lifetime_s: float) -> None:
        """See `Sandbox.extend`."""
        self._sandbox.extend(lifetime_s)

    async def close(self, changes: ChangesChoice = "apply") -> Result:
        """See `Sandbox.close`. If the task is cancelled, the sandbox is closed nevertheless."""
        return await in_thread(partial(self._sandbox.close, changes), _nothing)

    async def kill(self) -> Result:
        """See `Sandbox.kill`."""
        return await self.close("discard")

    async def __aenter__(self) -> Self:
        return await self.open() if self._opened is None else self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await in_thread(lambda: self._sandbox.__exit__(kind, value, trace), _nothing)

    @property
    def _sandbox(self) -> Sandbox:
        if self._opened is None:
            raise UsageError("cannot use the sandbox", "it is not open", "Use async with, or await open()")
        return self._opened

    async def _run(self, call: Callable[..., Ended], options: ExecOptions) -> Ended:
        import asyncio

        loop = asyncio.get_running_loop()
        given_up = threading.Event()
        if (on_output := options.get("on_output")) is not None:
            options["on_output"] = lambda name, data: loop.call_soon_threadsafe(on_output, name, data)

        def cancel() -> None:
            given_up.set()
            self._sandbox.wake()

        return await in_thread(partial(call, given_up=given_up.is_set, **options), cancel)


class AsyncProcess:
    """A command that runs in a sandbox, for asyncio. Its methods are those of `Process`."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @property
    def id(self) -> int:
        """See `Process.id`."""
        return self._process.id

    async def write(self, data: bytes) -> None:
        """See `Process.write`."""
        await self._in_thread(lambda process: process.write(data))

    def close_stdin(self) -> None:
        """See `Process.close_stdin`."""
        self._process.close_stdin()

    async def read(self, stream: StreamName = "stdout", timeout_s: float | None = None) -> bytes:
        """See `Process.read`."""
        return await self._in_thread(lambda process: process.read(stream, timeout_s))

    async def __aiter__(self) -> AsyncIterator[tuple[StreamName, bytes]]:
        ended = False
        while not ended:
            ended, pieces = await self._in_thread(lambda process: process.next_pieces())
            for piece in pieces:
                yield piece

    async def poll(self) -> Ended | None:
        """See `Process.poll`."""
        return await self._in_thread(lambda process: process.poll())

    async def wait(self, timeout_s: float | None = None) -> Ended:
        """See `Process.wait`."""
        return await self._in_thread(lambda process: process.wait(timeout_s))

    def signal(self, number: int) -> None:
        """See `Process.signal`."""
        self._process.signal(number)

    def kill(self) -> None:
        """See `Process.kill`."""
        self._process.kill()

    def resize(self, rows: int, columns: int) -> None:
        """See `Process.resize`."""
        self._process.resize(rows, columns)

    async def _in_thread(self, call: Callable[[Process], _T]) -> _T:
        given_up = threading.Event()

        def cancel() -> None:
            given_up.set()
            self._process.wake()

        return await in_thread(lambda: call(self._process.for_caller(given_up.is_set)), cancel)


class AsyncFiles:
    """The files of a sandbox, for asyncio. Its methods are those of `Files`.

    If a task is cancelled, an unknown part of its request has been carried out.
    """

    def __init__(self, files: Files) -> None:
        self._files = files

    async def read(
        self,
        path: str | os.PathLike[str],
        *,
        offset: int = 0,
        max_bytes: int | None = None,
        timeout_s: float | None = None,
    ) -> bytes:
        """See `Files.read`."""
        most: dict[str, Any] = {} if max_bytes is None else {"max_bytes": max_bytes}
        return await self._in_thread(partial(self._files.read, path, offset=offset, timeout_s=timeout_s, **most))

    async def write(
        self, path: str | os.PathLike[str], data: bytes, *, mode: int | None = None, timeout_s: float | None = None
    ) -> None:
        """See `Files.write`."""
        await self._in_thread(partial(self._files.write, path, data, mode=mode, timeout_s=timeout_s))

    async def list(self, path: str | os.PathLike[str] = ".", *, timeout_s: float | None = None) -> list[FileInfo]:
        """See `Files.list`."""
        return await self._in_thread(partial(self._files.list, path, timeout_s=timeout_s))

    async def stat(
        self, path: str | os.PathLike[str], *, follow: bool = True, timeout_s: float | None = None
    ) -> FileInfo:
        """See `Files.stat`."""
        return await self._in_thread(partial(self._files.stat, path, follow=follow, timeout_s=timeout_s))

    async def exists(self, path: str | os.PathLike[str], *, timeout_s: float | None = None) -> bool:
        """See `Files.exists`."""
        return await self._in_thread(partial(self._files.exists, path, timeout_s=timeout_s))

    async def mkdir(
        self,
        path: str | os.PathLike[str],
        *,
        parents: bool = True,
        mode: int | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """See `Files.mkdir`."""
        await self._in_thread(partial(self._files.mkdir, path, parents=parents, mode=mode, timeout_s=timeout_s))

    async def remove(
        self, path: str | os.PathLike[str], *, recursive: bool = False, timeout_s: float | None = None
    ) -> None:
        """See `Files.remove`."""
        await self._in_thread(partial(self._files.remove, path, recursive=recursive, timeout_s=timeout_s))

    async def upload(
        self, local: str | os.PathLike[str], path: str | os.PathLike[str], *, timeout_s: float | None = None
    ) -> None:
        """See `Sandbox.upload`."""
        await self._in_thread(partial(self._files.upload, local, path, timeout_s=timeout_s))

    async def download(
        self, path: str | os.PathLike[str], local: str | os.PathLike[str], *, timeout_s: float | None = None
    ) -> None:
        """See `Sandbox.download`."""
        await self._in_thread(partial(self._files.download, path, local, timeout_s=timeout_s))

    async def _in_thread(self, call: Callable[[], _T]) -> _T:
        caller = threading.Event()

        def carry_out() -> _T:
            with self._files.called_by(caller):
                return call()

        return await in_thread(carry_out, lambda: self._files.abort(caller))
