"""Sandboxes for agents of the OpenAI Agents SDK: `SandboxRunConfig(client=X07SandboxClient())`."""

from __future__ import annotations

import asyncio
import io
import shlex
import uuid
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Literal

from agents.sandbox.errors import (
    ConfigurationError,
    ErrorCode,
    ExecTimeoutError,
    ExecTransportError,
    MountConfigError,
    WorkspaceArchiveReadError,
    WorkspaceArchiveWriteError,
    WorkspaceReadNotFoundError,
    WorkspaceStartError,
    WorkspaceWriteTypeError,
)
from agents.sandbox.manifest import Manifest
from agents.sandbox.session import SandboxSessionState
from agents.sandbox.session.base_sandbox_session import BaseSandboxSession
from agents.sandbox.session.pty_output import collect_pty_output
from agents.sandbox.session.pty_types import PtyExecUpdate, clamp_pty_yield_time_ms, resolve_pty_write_yield_time_ms
from agents.sandbox.session.runtime_helpers import RESOLVE_WORKSPACE_PATH_HELPER
from agents.sandbox.session.sandbox_client import BaseSandboxClient, BaseSandboxClientOptions
from agents.sandbox.session.tar_workspace import shell_tar_exclude_args
from agents.sandbox.snapshot import resolve_snapshot
from agents.sandbox.types import ExecResult, ExposedPortEndpoint
from agents.sandbox.util.tar_utils import UnsafeTarMemberError, validate_tar_bytes

from x07_sandbox import AsyncSandbox, SandboxError
from x07_sandbox.integrations import was_stopped
from x07_sandbox.library.files import READ_MAX

if TYPE_CHECKING:
    from pathlib import Path

    from agents.sandbox.snapshot import SnapshotBase, SnapshotSpec

    from x07_sandbox import Ended
    from x07_sandbox.library.async_sandbox import AsyncProcess

_ARCHIVE_MAX: Final = 1 << 30
_NOT_OF_SANDBOXES: Final = {"type", "keep", "pause", "exposed_ports"}


class X07Options(BaseSandboxClientOptions):
    """A sandbox of an agent. All else: see `Sandbox`.

    keep: whether it outlives the run, to be resumed by its id. pause: whether it is paused meanwhile. snapshot: of
    `Sandbox.snapshot`, from which it starts; only lifetime_s and idle_s apply then.
    """

    type: Literal["x07"] = "x07"
    image: str | None = None
    policy: str | None = None
    memory: str | int | None = None
    procs: int | None = None
    allow_hosts: tuple[str, ...] = ()
    guest_root: bool = True
    lifetime_s: float = 3600
    idle_s: float | None = None
    exposed_ports: tuple[int, ...] = ()
    keep: bool = False
    pause: bool = False
    snapshot: str | None = None


class X07State(SandboxSessionState):
    """What is stored of a session."""

    type: Literal["x07"] = "x07"
    sandbox_id: str
    options: X07Options


class _Terminal:
    """A process that runs on between calls, and the output that no call has returned."""

    def __init__(self, process: AsyncProcess) -> None:
        self.process = process
        self.chunks: deque[bytes] = deque()
        self.lock, self.notify = asyncio.Lock(), asyncio.Event()
        self.ended: Ended | None = None
        self.reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for _stream, data in self.process:
            async with self.lock:
                self.chunks.append(data)
            self.notify.set()
        self.ended = await self.process.wait()
        self.notify.set()

    async def update(self, yield_ms: int, most: int | None) -> PtyExecUpdate:
        """Return the output until the process ends, or for this time."""
        output, tokens, over = await collect_pty_output(
            output_chunks=self.chunks,
            output_lock=self.lock,
            output_notify=self.notify,
            is_done=self.reader.done,
            yield_time_ms=yield_ms,
            max_output_tokens=most,
        )
        code = None
        if over:
            self.reader.result()  # may raise
            code = None if self.ended is None else self.ended.x07_exit_code
        return PtyExecUpdate(None if over else self.process.id, output, code, tokens)


class X07Session(BaseSandboxSession):
    """A session in one sandbox."""

    state: X07State

    def __init__(self, state: X07State, sandbox: AsyncSandbox) -> None:
        self.state = state
        self._sandbox = sandbox
        self._root_made = False
        self._terminals: dict[int, _Terminal] = {}

    async def _prepare_backend_workspace(self) -> None:
        root = self._workspace_root_path()
        try:
            await self._sandbox.files.mkdir(str(root))
        except OSError as exc:
            raise WorkspaceStartError(path=root, cause=exc, message=f"cannot make {root}: {exc}") from exc
        self._root_made = True

    async def _validate_path_access(self, path: Path | str, *, for_write: bool = False) -> Path:
        checked: Path = await self._validate_remote_path_access(path, for_write=for_write)
        return checked

    def _runtime_helpers(self) -> tuple[Any, ...]:
        return (RESOLVE_WORKSPACE_PATH_HELPER,)

    def _current_runtime_helper_cache_key(self) -> object:
        return self.state.sandbox_id

    def _prepare_exec_command(self, *command: str | Path, shell: bool | list[str], user: Any) -> list[str]:  # noqa: ANN401
        _no_user(user)
        argv: list[str] = super()._prepare_exec_command(*command, shell=shell, user=None)
        return argv

    async def _place(self) -> dict[str, Any]:
        env = await self.state.manifest.environment.resolve()
        return {"cwd": self.state.manifest.root if self._root_made else None, "env": env}

    async def _exec_internal(self, *command: str | Path, timeout: float | None = None) -> ExecResult:  # noqa: ASYNC109
        argv = [str(word) for word in command]
        try:
            ended = await self._sandbox.exec(argv, timeout_s=timeout, **await self._place())
        except SandboxError as exc:
            raise ExecTransportError(command=argv, cause=exc, message=str(exc)) from exc
        if ended.outcome == "timeout":
            raise ExecTimeoutError(command=argv, timeout_s=timeout, context={"reason": ended.reason})
        errors = ended.stderr
        if was_stopped(ended):
            errors += f"{ended.reason}\n".encode()
        return ExecResult(stdout=ended.stdout, stderr=errors, exit_code=ended.x07_exit_code)

    async def _resolve_exposed_port(self, port: int) -> ExposedPortEndpoint:
        host, number = await self._sandbox.forward(port)
        return ExposedPortEndpoint(host=host, port=number)

    async def _read_bounded(self, path: Path, *, max_bytes: int) -> bytes:
        return await self._read(path, max_bytes)

    async def read(self, path: Path, *, user: Any = None) -> io.IOBase:  # noqa: ANN401 - as the SDK has it
        """Return the content of a file."""
        _no_user(user)
        return io.BytesIO(await self._read(path))

    async def _read(self, path: Path, most: int = READ_MAX) -> bytes:
        checked = await self._validate_path_access(path)
        try:
            return await self._sandbox.files.read(checked.as_posix(), max_bytes=most)
        except FileNotFoundError as exc:
            raise WorkspaceReadNotFoundError(path=path, cause=exc) from exc
        except OSError as exc:
            raise WorkspaceArchiveReadError(path=path, cause=exc) from exc

    async def write(self, path: Path, data: io.IOBase, *, user: Any = None) -> None:  # noqa: ANN401 - as above
        """Create or replace a file, and the folders above it."""
        _no_user(user)
        content = data.read()
        content = content.encode() if isinstance(content, str) else content
        if not isinstance(content, bytes | bytearray):
            raise WorkspaceWriteTypeError(path=path, actual_type=type(content).__name__)
        checked = await self._validate_path_access(path, for_write=True)
        try:
            await self._sandbox.files.write(checked.as_posix(), bytes(content))
        except OSError as exc:
            raise WorkspaceArchiveWriteError(path=path, cause=exc) from exc

    async def running(self) -> bool:
        """Return whether commands can run."""
        return self._root_made and self._sandbox.alive

    async def persist_workspace(self) -> io.IOBase:
        """Return the workspace as a tar archive."""
        root = self._workspace_root_path()
        excluded = shlex.split(" ".join(shell_tar_exclude_args(self._persist_workspace_skip_relpaths())))
        argv = ["tar", *excluded, "-C", str(root), "-cf", "-", "."]
        ended = await self._sandbox.exec(argv, max_output_bytes=_ARCHIVE_MAX)
        if not ended.ok or ended.truncated:
            why = ended.stderr.decode(errors="replace") or f"{ended.reason}, or more than {_ARCHIVE_MAX} bytes"
            raise WorkspaceArchiveReadError(path=root, context={"reason": why})
        return io.BytesIO(ended.stdout)

    async def hydrate_workspace(self, data: io.IOBase) -> None:
        """Unpack a tar archive into the workspace."""
        root, raw = self._workspace_root_path(), data.read()
        try:
            validate_tar_bytes(raw, allow_external_symlink_targets=False)
        except UnsafeTarMemberError as exc:
            raise WorkspaceArchiveWriteError(path=root, context={"member": exc.member}, cause=exc) from exc
        await self._sandbox.files.mkdir(str(root))
        ended = await self._sandbox.exec(["tar", "-C", str(root), "-xf", "-"], input=raw)
        if not ended.ok:
            raise WorkspaceArchiveWriteError(path=root, context={"reason": ended.stderr.decode(errors="replace")})
        self._root_made = True

    def supports_pty(self) -> bool:
        """Return True: commands may have a terminal, and run on between calls."""
        return True

    async def pty_exec_start(
        self,
        *command: str | Path,
        timeout: float | None = None,  # noqa: ASYNC109
        shell: bool | list[str] = True,
        user: Any = None,  # noqa: ANN401
        tty: bool = False,
        yield_time_s: float | None = None,
        max_output_tokens: int | None = None,
    ) -> PtyExecUpdate:
        """Start a command, and return its output until it ends, or for some time."""
        argv = self._prepare_exec_command(*command, shell=shell, user=user)
        try:
            process = await self._sandbox.start(argv, timeout_s=timeout, tty=tty, merge=not tty, **await self._place())
        except SandboxError as exc:
            raise ExecTransportError(command=argv, cause=exc, message=str(exc)) from exc
        if not tty:
            await process.close_stdin()
        self._terminals[process.id] = _Terminal(process)
        yield_ms = 10_000 if yield_time_s is None else int(yield_time_s * 1000)
        return await self._update(process.id, clamp_pty_yield_time_ms(yield_ms), max_output_tokens)

    async def pty_write_stdin(
        self, *, session_id: int, chars: str, yield_time_s: float | None = None, max_output_tokens: int | None = None
    ) -> PtyExecUpdate:
        """Type into the terminal of a command, and return what comes."""
        terminal = self._resolve_pty_session_entry(pty_processes=self._terminals, session_id=session_id)
        if chars:
            await terminal.process.write(chars.encode())
        yield_ms = 250 if yield_time_s is None else int(yield_time_s * 1000)
        yield_ms = resolve_pty_write_yield_time_ms(yield_time_ms=yield_ms, input_empty=not chars)
        return await self._update(session_id, yield_ms, max_output_tokens)

    async def _update(self, number: int, yield_ms: int, most: int | None) -> PtyExecUpdate:
        update = await self._terminals[number].update(yield_ms, most)
        if update.process_id is None:
            self._terminals.pop(number, None)
        return update

    async def pty_terminate_all(self) -> None:
        """Kill all commands that run on between calls."""
        terminals = [self._terminals.popitem()[1] for _ in list(self._terminals)]
        for terminal in terminals:
            await terminal.process.kill()
        await asyncio.gather(*(terminal.reader for terminal in terminals), return_exceptions=True)

    async def _shutdown_backend(self) -> None:
        if self.state.options.pause:
            await self._sandbox.pause()
        elif self.state.options.keep:
            await self._sandbox.disconnect()
        elif self._sandbox.alive:
            await self._sandbox.kill()


class X07SandboxClient(BaseSandboxClient[X07Options]):
    """Opens sandboxes for the SDK, and connects to them again."""

    backend_id = "x07"
    supports_default_options = True

    async def create(
        self,
        *,
        snapshot: SnapshotSpec | SnapshotBase | None = None,
        manifest: Manifest | None = None,
        options: X07Options | None = None,
    ) -> Any:  # noqa: ANN401 - of a module of the SDK
        """Open a sandbox. Raises SandboxError."""
        manifest = self._validate_manifest_for_create(manifest or Manifest())
        if manifest.mount_targets():
            raise MountConfigError(message="x07 mounts nothing: copy files into the manifest, or list hosts")
        options, number = options or X07Options(), uuid.uuid4()
        state = X07State(
            session_id=number,
            snapshot=resolve_snapshot(snapshot, str(number)),
            manifest=manifest,
            exposed_ports=options.exposed_ports,
            sandbox_id="",
            options=options,
        )
        return self._wrap_session(await _created(state))

    async def resume(self, state: SandboxSessionState) -> Any:  # noqa: ANN401 - as above
        """Connect to the sandbox of a session, or open one in its place, which gets the files of the snapshot."""
        if not isinstance(state, X07State):
            raise TypeError(f"the state is of {state.type}, not of x07")
        state.assert_path_grants_rebound()
        try:
            session = X07Session(state, await AsyncSandbox.connect(state.sandbox_id))
        except SandboxError:  # it has ended
            state.workspace_root_ready = False
            return self._wrap_session(await _created(state))
        session._set_start_state_preserved(workspace=True)  # noqa: SLF001 - for clients
        return self._wrap_session(session)

    async def delete(self, session: Any) -> Any:  # noqa: ANN401 - as above
        """Do nothing: a sandbox ends with its session, unless it is to be kept."""
        return session

    def deserialize_session_state(self, payload: dict[str, object]) -> SandboxSessionState:
        """Return the state that was stored."""
        return self._deserialize_session_state_payload(payload, X07State)


async def _created(state: X07State) -> X07Session:
    given = {name: value for name, value in state.options if name not in _NOT_OF_SANDBOXES}
    if state.options.snapshot is not None:
        given = {name: given[name] for name in ("snapshot", "lifetime_s", "idle_s")}
    sandbox = await AsyncSandbox.create(**given, tags={"openai-agents": str(state.session_id)})
    state.sandbox_id = sandbox.id
    return X07Session(state, sandbox)


def _no_user(user: object) -> None:
    if user is not None:
        raise ConfigurationError(
            message="x07 runs all commands of a sandbox as one user: leave out the user",
            error_code=ErrorCode.SANDBOX_CONFIG_INVALID,
            op="exec",
            context={"backend": "x07"},
        )
