"""The shell tool of the OpenAI Agents SDK in a sandbox: `ShellTool(executor=X07Shell(sandbox))`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from agents import ShellCallOutcome, ShellCommandOutput, ShellResult

from x07_sandbox import SandboxError
from x07_sandbox.integrations import BAD_COMMAND, errors_of, require_usage

if TYPE_CHECKING:
    from agents import ShellCommandRequest

    from x07_sandbox import AsyncSandbox, Ended

TIMEOUT_S: Final = 120.0
OUTPUT_MAX: Final = 64 * 1024  # of each stream, unless the model sets a limit


class X07Shell:
    """Executes the commands of a shell call one after the other, each in a new shell of the sandbox.

    timeout_s: the time limit of a command. The model may only ask for less.
    """

    def __init__(self, sandbox: AsyncSandbox, *, timeout_s: float = TIMEOUT_S) -> None:
        self._sandbox = sandbox
        self._timeout_s = timeout_s

    async def __call__(self, request: ShellCommandRequest) -> ShellResult:
        """Run the commands until one reaches its timeout. Raises SandboxError if the sandbox has ended."""
        action = request.data.action
        asked_s = (action.timeout_ms or 0) / 1000
        timeout_s = min(asked_s, self._timeout_s) if asked_s > 0 else self._timeout_s
        most = OUTPUT_MAX if action.max_output_length is None else max(0, action.max_output_length)
        output: list[ShellCommandOutput] = []
        for command in action.commands:
            output.append(await self._run(command, timeout_s, most))
            if output[-1].outcome.type == "timeout":  # what follows may depend on it
                break
        return ShellResult(output, max_output_length=action.max_output_length)

    async def _run(self, command: str, timeout_s: float, most: int) -> ShellCommandOutput:
        try:
            ended = await self._sandbox.shell(command, timeout_s=timeout_s, max_output_bytes=most, keep="both")
        except SandboxError as exc:
            require_usage(exc)
            return ShellCommandOutput("", f"{exc}\n", ShellCallOutcome("exit", BAD_COMMAND), command)
        return ShellCommandOutput(ended.stdout.decode(errors="replace"), errors_of(ended), _outcome(ended), command)


def _outcome(ended: Ended) -> ShellCallOutcome:
    if ended.outcome == "timeout":
        return ShellCallOutcome("timeout")
    return ShellCallOutcome("exit", ended.x07_exit_code)
