"""The sandbox provider "x07" of Inspect: `Task(sandbox="x07")`, or `--sandbox x07:policy.json`.

Inspect finds it by the entry point `inspect_ai` of this package. Each sample gets a sandbox of its own.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn, overload

from inspect_ai.util import (
    ExecResult,
    OutputLimitExceededError,
    SandboxEnvironment,
    SandboxEnvironmentLimits,
    SandboxUnavailableError,
    SandboxUserUnsupportedError,
    sandboxenv,
)
from pydantic import BaseModel, ConfigDict

from x07_sandbox import AsyncSandbox, Sandbox, SandboxError
from x07_sandbox.integrations import BAD_COMMAND, errors_of

if TYPE_CHECKING:
    from x07_sandbox import Ended

LIFETIME_S: Final = 24 * 3600.0  # samples have time limits of their own


class X07Config(BaseModel):
    """The keywords of `Sandbox` that a task or sample may set: `SandboxEnvironmentSpec("x07", X07Config(...))`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: str | None = None
    image: str | None = None
    snapshot: str | None = None
    workdir: str | None = None
    env: dict[str, str] | None = None
    allow_hosts: tuple[str, ...] = ()
    guest_root: bool = False
    memory: str | int | None = None
    procs: int | None = None
    lifetime_s: float = LIFETIME_S

    def __hash__(self) -> int:
        """Return a number for Inspect, which groups samples by their configuration."""
        return hash(self.model_dump_json())


@sandboxenv(name="x07")
class X07SandboxEnvironment(SandboxEnvironment):
    """One sandbox of one sample."""

    def __init__(self, sandbox: AsyncSandbox, config: X07Config) -> None:
        super().__init__()
        self._sandbox = sandbox
        self._users = {"root", "0"} if config.guest_root else {"x07", "65532"}

    @classmethod
    async def sample_init(
        cls,
        task_name: str,  # noqa: ARG003 - Inspect's signature
        config: BaseModel | str | None,
        metadata: dict[str, str],  # noqa: ARG003
    ) -> dict[str, SandboxEnvironment]:
        """Open a sandbox. config: an `X07Config`, or the path of a policy."""
        chosen = config if isinstance(config, X07Config) else X07Config(policy=config or None)
        sandbox = await AsyncSandbox(**chosen.model_dump()).open()
        return {"default": cls(sandbox, chosen)}

    @classmethod
    async def sample_cleanup(
        cls,
        task_name: str,  # noqa: ARG003 - Inspect's signature
        config: BaseModel | str | None,  # noqa: ARG003
        environments: dict[str, SandboxEnvironment],
        interrupted: bool,  # noqa: ARG003, FBT001
    ) -> None:
        """Close the sandbox, and drop its changes."""
        for environment in environments.values():
            await environment.as_type(cls)._sandbox.kill()  # noqa: SLF001 - of this class

    @classmethod
    def config_deserialize(cls, config: dict[str, Any]) -> BaseModel:
        """Return a configuration that a log contains."""
        return X07Config(**config)

    @classmethod
    def default_concurrency(cls) -> int | None:
        """Return how many sandboxes to open at once, since one that waits too long is refused."""
        return Sandbox.max_open()

    def default_polling_interval(self) -> float:
        """Return the seconds between two looks for requests of the sandbox."""
        return 0.5

    async def exec(  # noqa: D102, PLR0913, PLR0917 - Inspect's signature, which it counts
        self,
        cmd: list[str],
        input: str | bytes | None = None,  # noqa: A002
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        user: str | None = None,
        timeout: int | None = None,  # noqa: ASYNC109
        timeout_retry: bool = True,  # noqa: ARG002, FBT001, FBT002 - a command that took too long once is not repeated
        concurrency: bool = True,  # noqa: ARG002, FBT001, FBT002 - commands are no processes of the host
    ) -> ExecResult[str]:
        self._check_user(user)
        most = SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE
        data = input.encode() if isinstance(input, str) else input or b""
        try:
            ended = await self._sandbox.exec(
                cmd, input=data, cwd=cwd, env=env, timeout_s=timeout, max_output_bytes=most, keep="tail"
            )
        except SandboxError as exc:
            if exc.code == "usage":  # such as a word that is too long, which a model may have written
                return ExecResult(False, BAD_COMMAND, "", f"{exc}\n")  # noqa: FBT003
            self._raise(exc)
        return _result(ended)

    async def write_file(self, file: str, contents: str | bytes) -> None:  # noqa: D102
        data = contents.encode() if isinstance(contents, str) else contents
        try:
            await self._sandbox.files.write(file, data)
        except OSError as exc:
            if exc.errno == errno.EROFS:  # the system is read-only
                raise PermissionError(errno.EACCES, exc.strerror, file) from exc
            raise
        except SandboxError as exc:
            self._raise(exc)

    @overload
    async def read_file(self, file: str, text: Literal[True] = True) -> str: ...  # noqa: FBT002

    @overload
    async def read_file(self, file: str, text: Literal[False]) -> bytes: ...

    async def read_file(self, file: str, text: bool = True) -> str | bytes:  # noqa: D102, FBT001, FBT002
        most = SandboxEnvironmentLimits.MAX_READ_FILE_SIZE
        data = bytearray()
        try:
            while piece := await self._sandbox.files.read(file, offset=len(data), max_bytes=most + 1 - len(data)):
                data += piece
        except SandboxError as exc:
            self._raise(exc)
        if len(data) > most:
            raise OutputLimitExceededError(SandboxEnvironmentLimits.MAX_READ_FILE_SIZE_STR, None)
        return data.decode() if text else bytes(data)

    def _check_user(self, user: str | None) -> None:
        if user is not None and user not in self._users:
            users = " or ".join(sorted(self._users))
            raise SandboxUserUnsupportedError(f"commands of this sandbox cannot run as {user!r}, only as {users}")

    def _raise(self, error: SandboxError) -> NoReturn:
        if self._sandbox.alive:
            raise error
        raise SandboxUnavailableError(str(error)) from error


def _result(ended: Ended) -> ExecResult[str]:
    """Return the result of a command. Raises TimeoutError, PermissionError."""
    out = ended.stdout.decode(errors="replace")
    if ended.outcome == "timeout":
        error = TimeoutError(ended.reason)
        error.truncated_output = out + ended.stderr.decode(errors="replace")  # type: ignore[attr-defined] # Inspect passes it on
        raise error
    if ended.reason_code == "not-executable":
        raise PermissionError(ended.reason)
    return ExecResult(ended.ok, ended.x07_exit_code, out, errors_of(ended))
