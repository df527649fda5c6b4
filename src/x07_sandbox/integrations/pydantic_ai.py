"""A workspace of Pydantic AI that is a sandbox: `agent.run(..., workspace=X07Workspace(policy="policy.json"))`.

The first operation opens the sandbox. It has a process of its own, and stays until it is closed or at the end of its
lifetime: `Sandbox.connect(workspace.ref.id).close()`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import posixpath
from typing import TYPE_CHECKING, Final, TypeVar, Unpack

from pydantic_ai.workspaces import (
    CommandResult,
    FileEntry,
    SupportsCommands,
    SupportsFilesystem,
    SupportsRealpath,
    WorkspaceBackend,
    WorkspaceOutputLimitError,
    WorkspaceRef,
    WorkspaceTimeoutError,
    WorkspaceUnavailableError,
)

from x07_sandbox import AsyncSandbox, SandboxError
from x07_sandbox.integrations import errors_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from pydantic_ai.workspaces import WorkspaceCommand

    from x07_sandbox import FileInfo
    from x07_sandbox.library.sandbox import SandboxOptions

_T = TypeVar("_T")

PROVIDER: Final = "x07"
OUTPUT_MAX: Final = 10 << 20  # bytes of a stream; more of it is an error, since results must be complete
_LINKS_MAX: Final = 40  # as in the kernel


class X07Workspace(WorkspaceBackend, SupportsCommands, SupportsFilesystem, SupportsRealpath):
    """A sandbox as a workspace. ref: of a sandbox that is open; None to open one, with the keywords of `Sandbox`."""

    def __init__(self, ref: WorkspaceRef | None = None, **options: Unpack[SandboxOptions]) -> None:
        self._ref = ref
        self._options = options
        self._opening: asyncio.Task[AsyncSandbox] | None = None
        self._sandbox: AsyncSandbox | None = None
        self._folder = ""

    @property
    def ref(self) -> WorkspaceRef | None:
        """What names the sandbox, once it is open."""
        return self._ref

    async def working_dir(self) -> str:
        """Return the folder in which commands start."""
        if not self._folder:
            found = await self._ask(lambda sandbox: sandbox.exec(["/bin/sh", "-c", "pwd -P"], check=True))
            self._folder = found.stdout.decode().removesuffix("\n")
        return self._folder

    async def run(  # noqa: D102 - as in the protocol
        self,
        command: WorkspaceCommand,
        *,
        shell: bool = False,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> CommandResult:
        if isinstance(command, str) != shell:
            raise TypeError("a string needs shell=True, and a list of words shell=False")
        if timeout is not None and not 0 < timeout < math.inf:
            raise ValueError("timeout must be a positive finite number or None")
        ended = await self._ask(
            lambda sandbox: (
                sandbox.shell(command, env=env, timeout_s=timeout, max_output_bytes=OUTPUT_MAX)
                if isinstance(command, str)
                else sandbox.exec(command, env=env, timeout_s=timeout, max_output_bytes=OUTPUT_MAX)
            )
        )
        out, err = (data.decode(errors="replace") for data in (ended.stdout, ended.stderr))
        if ended.outcome == "timeout":
            raise WorkspaceTimeoutError(ended.reason, stdout=out, stderr=err)
        if ended.truncated:
            why = f"a stream has more than {OUTPUT_MAX} bytes"
            raise WorkspaceOutputLimitError(why, limit=OUTPUT_MAX, stdout=out, stderr=err)
        return CommandResult(exit_code=ended.x07_exit_code, stdout=out, stderr=errors_of(ended))

    async def read_bytes(self, path: str) -> bytes:  # noqa: D102
        if (await self._stat(path)).kind == "other":  # such as a FIFO, which seems to be empty
            raise OSError(errno.EINVAL, "not a regular file", path)
        return await self._ask(lambda sandbox: _content(sandbox, path))

    async def write_bytes(self, path: str, data: bytes) -> None:  # noqa: D102
        await self._ask(lambda sandbox: sandbox.files.write(path, data))

    async def stat(self, path: str) -> FileEntry:  # noqa: D102
        return _entry(path, await self._stat(path))

    async def list_dir(self, path: str) -> Sequence[FileEntry]:  # noqa: D102
        entries = []
        for info in await self._ask(lambda sandbox: sandbox.files.list(path)):
            name, found = posixpath.join(path, info.name), info
            if info.kind == "link":
                with contextlib.suppress(OSError):  # it leads nowhere, or to itself
                    found = await self._stat(name)
            entries.append(_entry(name, found))
        return entries

    async def make_dir(self, path: str) -> None:  # noqa: D102
        await self._ask(lambda sandbox: sandbox.files.mkdir(path))

    async def remove(self, path: str) -> None:  # noqa: D102
        root = await self.working_dir()
        folder, name = posixpath.split(posixpath.normpath(path))
        real = posixpath.join(await self.realpath(folder), name)
        if f"{root}/".startswith(f"{real.rstrip('/')}/"):
            raise ValueError("the working directory and the folders above it cannot be removed")
        await self._ask(lambda sandbox: sandbox.files.remove(real, recursive=True))

    async def exists(self, path: str) -> bool:  # noqa: D102
        return await self._ask(lambda sandbox: sandbox.files.exists(path))

    async def realpath(self, path: str) -> str:  # noqa: D102
        rest, resolved, links = path.split("/")[::-1], "", 0
        while rest:
            part = rest.pop()
            if part in {"", "."}:
                continue
            if part == "..":
                resolved = posixpath.dirname(resolved).rstrip("/")
                continue
            target = ""
            if links < _LINKS_MAX:
                target = await self._target(f"{resolved}/{part}")
            if not target:
                resolved = f"{resolved}/{part}"
                continue
            links += 1
            rest += target.split("/")[::-1]
            if target.startswith("/"):
                resolved = ""
        return resolved or "/"

    async def _target(self, path: str) -> str:
        """Return where a link leads, or "" if the path is no link or does not exist."""
        try:
            return (await self._stat(path, follow=False)).target
        except OSError as exc:
            if exc.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
                return ""
            raise

    async def _stat(self, path: str, *, follow: bool = True) -> FileInfo:
        return await self._ask(lambda sandbox: sandbox.files.stat(path, follow=follow))

    async def _ask(self, call: Callable[[AsyncSandbox], Awaitable[_T]]) -> _T:
        """Return what a call of the sandbox returns, and raise its errors as Pydantic AI knows them."""
        sandbox = await self._opened()
        try:
            return await call(sandbox)
        except SandboxError as exc:
            if not sandbox.alive:
                raise WorkspaceUnavailableError(str(exc)) from exc
            if exc.code == "usage":
                raise ValueError(str(exc)) from exc
            raise

    async def _opened(self) -> AsyncSandbox:
        if self._sandbox is not None:
            return self._sandbox
        if self._opening is None or (self._opening.done() and self._sandbox is None):
            self._opening = asyncio.create_task(self._open())
        # A caller that is cancelled leaves the task to others, and the sandbox keeps its ref.
        return await asyncio.shield(self._opening)

    async def _open(self) -> AsyncSandbox:
        if self._ref is None:
            self._sandbox = await AsyncSandbox.create(**self._options)
            self._ref = WorkspaceRef(provider=PROVIDER, id=self._sandbox.id)
            return self._sandbox
        try:
            self._sandbox = await AsyncSandbox.connect(self._ref.id)
        except SandboxError as exc:
            raise WorkspaceUnavailableError(str(exc)) from exc
        return self._sandbox


async def _content(sandbox: AsyncSandbox, path: str) -> bytes:
    data = bytearray()
    while piece := await sandbox.files.read(path, offset=len(data)):  # which returns 256 MiB at most
        data += piece
    return bytes(data)


def _entry(path: str, info: FileInfo) -> FileEntry:
    folder = info.kind == "folder"
    return FileEntry(name=posixpath.basename(path), path=path, is_dir=folder, size=None if folder else info.size)
