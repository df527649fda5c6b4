"""A Pydantic AI agent whose workspace is a sandbox. The model here is a script, so that the example runs offline.

    python examples/pydantic_ai_agent.py

Needs: .venv/bin/pip install -e '.[pydantic-ai]'
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from pydantic_ai import Agent, RunContext
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.function import AgentInfo, FunctionModel

from x07_sandbox import AsyncSandbox
from x07_sandbox.integrations.pydantic_ai import X07Workspace

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPT: Iterator[ModelResponse] = iter(
    [
        ModelResponse(parts=[ToolCallPart("write_file", {"path": "primes.py", "text": "print([2, 3, 5, 7])\n"})]),
        ModelResponse(parts=[ToolCallPart("run_command", {"command": "python3 primes.py"})]),
        ModelResponse(parts=[TextPart("There are four primes below ten.")]),
    ]
)


def model(_messages: list[ModelMessage], _info: AgentInfo) -> ModelResponse:
    """Return the next answer of the script."""
    return next(SCRIPT)


agent = Agent(FunctionModel(model))


@agent.tool
async def run_command(context: RunContext[None], command: str) -> str:
    """Run shell commands."""
    done = await context.workspace.run(["bash", "-c", command], timeout=60)
    print(f"$ {command}\n{done.stdout}{done.stderr}", end="")
    return f"exit code {done.exit_code}\n{done.stdout}{done.stderr}"


@agent.tool
async def write_file(context: RunContext[None], path: str, text: str) -> str:
    """Create or replace a file."""
    await context.workspace.write_text(path, text)
    return "written"


async def main() -> None:
    """Let the agent work, and close its sandbox."""
    workspace = X07Workspace(memory="256M", idle_s=600)
    try:
        answer = await agent.run("How many primes are below ten?", workspace=workspace)
        print(answer.output)
    finally:
        if workspace.ref is not None:
            await (await AsyncSandbox.connect(workspace.ref.id)).kill()


if __name__ == "__main__":
    asyncio.run(main())
