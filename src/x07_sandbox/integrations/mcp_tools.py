"""What the tools of `x07 mcp` do: sandboxes behind handles, commands in them, and their files."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import secrets
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from x07_sandbox.errors import SandboxError
from x07_sandbox.integrations.mcp_answers import (
    Answer,
    Running,
    changes_of,
    denied,
    errors,
    names,
    reason_of,
    untrusted,
)
from x07_sandbox.integrations.mcp_calls import (
    OUTPUT_MAX,
    CallError,
    Exec,
    arguments_of,
    bounded,
    marked,
    named,
    shown,
)
from x07_sandbox.library.async_sandbox import AsyncSandbox
from x07_sandbox.library.run import run_program_async

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from x07_sandbox.integrations.mcp_answers import Settings
    from x07_sandbox.integrations.mcp_calls import Close, List, Open, Read, RunCode, Write
    from x07_sandbox.sessions.command import Ended
    from x07_sandbox.sessions.result import Result

    Progress = Callable[[float, str], Awaitable[None]]

_MARKED: Final = "see the untrusted text"
_PROGRESS_S: Final = 2.0
_CALLS_KEPT: Final = 64
_ENDED_KEPT: Final = 256
_ENTRIES_MAX: Final = 500
_PROGRAM_S: Final = 600.0  # the longest time limit of a run
_READ_MAX: Final = OUTPUT_MAX * 3 // 4  # bytes of which base64 has as many as text may have


class Tools:
    """The tools of one server. For one event loop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._open: dict[str, AsyncSandbox | None] = {}  # None while it opens
        self._closing: dict[str, asyncio.Task[Result]] = {}  # these are open until they have closed
        self._ended: dict[str, str] = {}  # why
        self._calls: dict[str, Running] = {}

    async def call(self, tool: str, given: Mapping[str, Any], progress: Progress, answer_s: float) -> Answer | Running:
        """Carry out a call. Return its answer, or a command that still runs. Raises CallError."""
        arguments = arguments_of(tool, given)
        if tool in {"run_code", "sandbox_exec"}:
            running = await self._running(arguments)
            await self._wait(running, progress, answer_s)
            return running.answer() if running.task.done() else running
        found: Answer = await getattr(self, f"_{tool}")(arguments)
        return found

    def find(self, number: str) -> Running:
        """Return a command by its id. Raises CallError."""
        if (found := self._calls.get(number)) is None:
            raise CallError(f"there is no command with the id {named(number)}. Start it again.")
        return found

    async def close_all(self) -> None:
        """End all commands and close all sandboxes, even if the task is cancelled."""
        for running in self._calls.values():
            running.cancel()
        waiting = [running.task for running in self._calls.values()]
        closing = [self._close(handle) for handle, sandbox in self._open.items() if sandbox is not None]
        await asyncio.gather(*closing, *waiting, return_exceptions=True)

    # commands

    async def _running(self, asked: RunCode | Exec) -> Running:
        handle = asked.sandbox if isinstance(asked, Exec) else ""
        if asked.running:
            running = self.find(asked.running)
            if running.sandbox != handle:
                raise CallError("this id belongs to a command of another tool or sandbox. Use those of its answer.")
            return running
        if len(self._calls) >= _CALLS_KEPT:
            ended = next((one.id for one in self._calls.values() if one.task.done()), None)
            if ended is None:
                raise CallError(f"{_CALLS_KEPT} commands are running. Wait for one of them, or close its sandbox.")
            del self._calls[ended]
        timeout_s = min(asked.timeout_s or self.settings.timeout_s, self.settings.timeout_s)
        if isinstance(asked, Exec):
            sandbox = await self._sandbox(handle)
            running = Running(handle, partial(self._exec, sandbox, asked.command, timeout_s))
        else:
            self._require_room()
            running = Running(handle, partial(self._run, asked, timeout_s))
        self._calls[running.id] = running
        return running

    async def _wait(self, running: Running, progress: Progress, answer_s: float) -> None:
        until = time.monotonic() + answer_s
        try:
            while not running.task.done() and (left_s := until - time.monotonic()) > 0:
                await asyncio.wait({running.task}, timeout=min(left_s, _PROGRESS_S))
                if not running.task.done():
                    size = sum(one.size for one in running.kept.values())
                    await progress(running.elapsed_s, f"running, {size} bytes of output")
        except asyncio.CancelledError:
            running.cancel()
            raise

    async def _exec(self, sandbox: AsyncSandbox, command: str, timeout_s: float, own: Running) -> Answer:
        with errors("cannot run the command", sandbox):
            ended = await sandbox.shell(command, timeout_s=timeout_s, max_output_bytes=0, on_output=own.take)
        return Answer(self._facts(ended), own.output(*untrusted(ended)))

    async def _run(self, asked: RunCode, timeout_s: float, own: Running) -> Answer:
        from_policy = self.settings.options.get("policy") is not None and not asked.timeout_s
        with errors("cannot run the program"):
            result = await run_program_async(
                source=asked.code,
                toolchain=asked.language,
                input=asked.stdin.encode(),
                timeout_s=None if from_policy else min(timeout_s, _PROGRAM_S),
                changes=self._choice,
                max_files_bytes=0,
                on_output=own.take,
                **self.settings.options,
            )
        if result.outcome == "build-failed":
            own.take("stderr", result.stderr.data)
        changed = ("changed files", names(result.changes))
        facts = self._facts(result) | changes_of(result)
        return Answer(facts, own.output(*untrusted(result), changed))

    def _facts(self, ended: Ended | Result) -> dict[str, Any]:
        facts: dict[str, Any] = {"state": "ended", "outcome": ended.outcome, "exit_code": ended.exit_code}
        if ended.outcome != "ok":
            facts |= {"reason": reason_of(ended) or _MARKED, "granted": self.settings.about}
        if ended.denials:
            facts["denied"] = "Only the person who started this server can allow what was denied."
        return facts

    @property
    def _choice(self) -> Any:  # noqa: ANN401 - a literal
        return "apply" if self.settings.apply else "keep"

    # sandboxes

    def _require_room(self) -> None:
        programs = sum(not one.task.done() for one in self._calls.values() if not one.sandbox)
        if len(self._open) + programs >= self.settings.open_max:
            raise CallError(
                f"The limit of open sandboxes, {self.settings.open_max}, is reached. Close one with sandbox_close, or "
                f"wait: a sandbox that is not used for {self.settings.idle_s:g} s ends by itself."
            )

    async def _sandbox(self, handle: str) -> AsyncSandbox:
        """Return an open sandbox. Raises CallError."""
        sandbox = self._open.get(handle)
        if sandbox is not None and not sandbox.alive and handle not in self._closing:
            await self._closed(handle)
        if handle in self._closing:
            raise CallError("cannot use the sandbox: it is being closed. Call sandbox_close to wait for its end.")
        if (sandbox := self._open.get(handle)) is None:
            why = self._ended.get(handle, "no open sandbox has this handle")
            raise CallError(f"cannot use the sandbox: {why}. Open a new one with sandbox_open.")
        return sandbox

    async def _closed(self, handle: str) -> Result | None:
        """Close a sandbox, or find how it has ended. Return None if a call cannot wait for it. Raises SandboxError."""
        task = self._close(handle)
        done, _ = await asyncio.wait({task}, timeout=self.settings.answer_s)
        return task.result() if done else None

    def _close(self, handle: str) -> asyncio.Task[Result]:
        """Return the task that closes a sandbox. It goes on if the call that started it is cancelled."""
        if handle not in self._closing:
            self._closing[handle] = asyncio.create_task(self._end(handle))
            self._closing[handle].add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._closing[handle]

    async def _end(self, handle: str) -> Result:
        sandbox = self._open[handle]
        assert sandbox is not None  # noqa: S101 - for the type checker; _sandbox and close_all have looked
        self._ended[handle] = "it could not be closed"
        try:
            result = await sandbox.close(self._choice)
        finally:
            del self._open[handle], self._closing[handle]
        kept = f"; changes to its folders were kept as {result.run}" if result.changes.state == "kept" else ""
        why = reason_of(result) or result.outcome
        self._ended[handle] = f"it has ended ({why}), and its processes are gone{kept}"
        while len(self._ended) > _ENDED_KEPT:
            del self._ended[next(iter(self._ended))]
        return result

    async def _sandbox_open(self, _asked: Open) -> Answer:
        settings = self.settings
        for handle in [name for name, one in self._open.items() if one is not None and not one.alive]:
            with contextlib.suppress(SandboxError):
                await self._closed(handle)
        self._require_room()
        handle = secrets.token_urlsafe(16)
        self._open[handle] = None
        try:
            with errors("cannot open a sandbox"):
                async with asyncio.timeout(settings.answer_s):
                    options = {**settings.options, "wait_s": settings.answer_s / 3}
                    sandbox = AsyncSandbox(lifetime_s=settings.lifetime_s, idle_s=settings.idle_s, **options)
                    self._open[handle] = await sandbox.open()
        finally:
            if self._open[handle] is None:
                del self._open[handle]
        ends = f"after {settings.idle_s:g} s without use, or {settings.lifetime_s:g} s after its opening"
        left_out = marked([("not copied in", denied(sandbox.left_out))])
        return Answer({"sandbox": handle, "granted": settings.about, "ends": ends}, left_out)

    async def _sandbox_close(self, asked: Close) -> Answer:
        if asked.sandbox not in self._closing:
            await self._sandbox(asked.sandbox)
        with errors("cannot close the sandbox", self._open[asked.sandbox]):
            result = await self._closed(asked.sandbox)
        if result is None:
            return Answer({"state": "closing", "next": "Call sandbox_close again to wait for the end."})
        facts = {"state": "closed"} | changes_of(result)
        return Answer(facts, marked([("changed files", names(result.changes))]))

    async def _sandbox_read(self, asked: Read) -> Answer:
        sandbox = await self._sandbox(asked.sandbox)
        most = _READ_MAX if asked.base64 else OUTPUT_MAX
        with errors(f"cannot read {named(asked.path)}", sandbox):
            async with asyncio.timeout(self.settings.answer_s):
                size = (await sandbox.files.stat(asked.path)).size
                data = await sandbox.files.read(asked.path, offset=asked.offset, max_bytes=most)
        text = base64.b64encode(data).decode() if asked.base64 else shown(data, OUTPUT_MAX)
        facts = {"bytes_of_file": size, "offset": asked.offset, "bytes": len(data)}
        if asked.offset + len(data) < size:
            facts["next_offset"] = asked.offset + len(data)
        return Answer(facts, marked([("content", text)]))

    async def _sandbox_write(self, asked: Write) -> Answer:
        sandbox = await self._sandbox(asked.sandbox)
        try:
            data = base64.b64decode(asked.content, validate=True) if asked.base64 else asked.content.encode()
        except binascii.Error as exc:
            raise CallError(f"the content is not base64: {exc}. Encode it, or leave base64 out.") from None
        with errors(f"cannot write {named(asked.path)}", sandbox):
            async with asyncio.timeout(self.settings.answer_s):
                await sandbox.files.write(asked.path, data)
        return Answer({"bytes": len(data)})

    async def _sandbox_list(self, asked: List) -> Answer:
        sandbox = await self._sandbox(asked.sandbox)
        with errors(f"cannot list {named(asked.path)}", sandbox):
            async with asyncio.timeout(self.settings.answer_s):
                found = await sandbox.files.list(asked.path)
        lines = [json.dumps({"name": one.name, "kind": one.kind, "size": one.size}) for one in found[:_ENTRIES_MAX]]
        facts = {"entries": len(found), "left_out": len(found) - len(lines)}
        return Answer(facts, marked([("entries", bounded("\n".join(lines), OUTPUT_MAX))]))
