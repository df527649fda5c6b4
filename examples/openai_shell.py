"""An agent of the OpenAI Agents SDK whose shell is in a sandbox. The model is a script, so that it runs offline.

    python examples/openai_shell.py

Needs: .venv/bin/pip install -e '.[openai-agents]'
"""

from __future__ import annotations

import asyncio

from agents import Agent, RunConfig, Runner, ShellTool
from agents.testing import ScriptedModel, assistant_message
from openai.types.responses import ResponseFunctionShellToolCall
from openai.types.responses.response_function_shell_tool_call import Action

from x07_sandbox import AsyncSandbox
from x07_sandbox.integrations.openai_agents import X07Shell

COMMANDS = (
    ["echo 'print(6 * 9)' > answer.py", "python3 answer.py"],
    ["sed -i 's/9/7/' answer.py && python3 answer.py"],
)


def script() -> ScriptedModel:
    """Return a model that runs these commands, whatever it is asked."""
    calls = [
        ResponseFunctionShellToolCall(
            id=str(number), call_id=str(number), action=Action(commands=each), status="completed", type="shell_call"
        )
        for number, each in enumerate(COMMANDS)
    ]
    return ScriptedModel([*([call] for call in calls), [assistant_message("The answer is 42.")]])


async def main() -> None:
    """Let the agent work in a sandbox, and print what its commands and the agent say."""
    async with AsyncSandbox(memory="256M") as sandbox:
        agent = Agent("worker", model=script(), tools=[ShellTool(executor=X07Shell(sandbox))])
        result = await Runner.run(agent, "Print 42.", run_config=RunConfig(tracing_disabled=True))
    for item in result.new_items:
        if item.type == "tool_call_output_item":
            print(item.output)
    print(result.final_output)


if __name__ == "__main__":
    asyncio.run(main())
