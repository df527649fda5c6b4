"""An environment of Google's Agent Development Kit: `EnvironmentToolset(environment=X07Environment(...))`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from google.adk.environment import BaseEnvironment, ExecutionResult

from x07_sandbox import AsyncSandbox, SandboxError
from x07_sandbox.integrations import BAD_COMMAND, errors_of, require_usage

if TYPE_CHECKING:
    from x07_sandbox.library.sandbox import SandboxOptions

OUTPUT_MAX = 1 << 20  # of each stream; the tools of ADK cut it to what a model reads


class X07Environment(BaseEnvironment):
    """A sandbox, which is opened at its first use. options: see `Sandbox`."""

    def __init__(self, **options: Unpack[SandboxOptions]) -> None:
        self._options = options
        self._sandbox: AsyncSandbox | None = None
        self._folder = Path()

    @property
    def working_dir(self) -> Path:
        """The folder of the sandbox in which commands start."""
        self._open()
        return self._folder

    def _open(self) -> AsyncSandbox:
        if self._sandbox is None:
            raise RuntimeError("the environment is not open: await initialize() first")
        return self._sandbox

    async def initialize(self) -> None:
        """Open the sandbox, unless it is open. Raises SandboxError."""
        if self._sandbox is None:
            sandbox = await AsyncSandbox(**self._options).open()
            try:
                self._folder = Path((await sandbox.exec(["pwd"], check=True)).stdout.decode().rstrip("\n"))
            except BaseException:
                await sandbox.kill()
                raise
            self._sandbox = sandbox
            self.is_initialized = True

    async def close(self) -> None:
        """Close the sandbox. Changes to the folder of *workdir* are kept, for x07 diff and x07 apply."""
        sandbox, self._sandbox = self._sandbox, None
        self.is_initialized = False
        if sandbox is not None:
            await sandbox.close("keep")

    async def execute(self, command: str, *, timeout: float | None = None) -> ExecutionResult:  # noqa: ASYNC109
        """Run shell commands."""
        try:
            ended = await self._open().shell(command, timeout_s=timeout, max_output_bytes=OUTPUT_MAX, keep="both")
        except SandboxError as exc:
            require_usage(exc)
            return ExecutionResult(BAD_COMMAND, "", f"{exc}\n")
        output, timed_out = ended.stdout.decode(errors="replace"), ended.outcome == "timeout"
        return ExecutionResult(ended.x07_exit_code, output, errors_of(ended), timed_out)

    async def read_file(self, path: Path) -> bytes:
        """Return the content of a file. Raises OSError."""
        return await self._open().files.read(str(path))

    async def write_file(self, path: Path, content: str | bytes) -> None:
        """Write a file, and the folders above it. Raises OSError."""
        await self._open().files.write(str(path), content.encode() if isinstance(content, str) else content)
