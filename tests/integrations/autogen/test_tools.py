"""The tools of a sandbox in an agent of AutoGen, as docs/how-to/give-an-agent-a-tool.md attaches them."""

from __future__ import annotations

import asyncio
import json

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.messages import ToolCallExecutionEvent
from autogen_core import FunctionCall
from autogen_core.models import CreateResult, RequestUsage
from autogen_ext.models.replay import ReplayChatCompletionClient

from x07_sandbox import AsyncSandbox, tools


def calling(name: str, **arguments: object) -> CreateResult:
    """Return the answer of a model that calls a tool."""
    calls = [FunctionCall(id=name, name=name, arguments=json.dumps(arguments))]
    usage = RequestUsage(prompt_tokens=1, completion_tokens=1)
    return CreateResult(finish_reason="function_calls", content=calls, usage=usage, cached=False)


def test_an_agent_uses_the_tools() -> None:
    """A model writes a file, runs it, and reads an error."""
    script = [
        calling("write", path="a.py", content="print(6 * 7)"),
        calling("run", argv=["python3", "a.py"]),
        calling("read", path="/none"),
        "done",
    ]
    knows = {"vision": False, "function_calling": True, "json_output": False, "family": "unknown"}

    async def main() -> list[str]:
        client = ReplayChatCompletionClient(script, model_info={**knows, "structured_output": False})
        async with AsyncSandbox() as sandbox:
            agent = AssistantAgent("coder", client, tools=list(tools(sandbox)), max_tool_iterations=9)
            result = await agent.run(task="Compute it.")
            assert result.messages[-1].content == "done"
        events = [one for one in result.messages if isinstance(one, ToolCallExecutionEvent)]
        assert not any(answer.is_error for one in events for answer in one.content)
        return [answer.content for one in events for answer in one.content]

    assert asyncio.run(main()) == [
        "bytes: 12",
        "outcome: ok; exit code: 0\noutput:\n42\n",
        "error: cannot read /none: No such file or directory. Paths are those of the sandbox, not of the host.",
    ]
