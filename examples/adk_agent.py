"""An agent of Google's ADK that works in a sandbox. The model here is a script, so that the example runs offline.

    python examples/adk_agent.py

Needs: .venv/bin/pip install -e '.[adk]'
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from google.adk.agents import LlmAgent
from google.adk.models import BaseLlm, LlmRequest, LlmResponse
from google.adk.runners import InMemoryRunner
from google.adk.tools.environment import EnvironmentToolset
from google.genai.types import Content, Part

from x07_sandbox.integrations.adk import X07Environment

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

STEPS = (
    Part.from_function_call(name="WriteFile", args={"path": "answer.py", "content": "print(6 * 9)\n"}),
    Part.from_function_call(name="EditFile", args={"path": "answer.py", "old_string": "9", "new_string": "7"}),
    Part.from_function_call(name="Execute", args={"command": "python3 answer.py"}),
    Part.from_text(text="The answer is 42."),
)


class Script(BaseLlm):
    """A model that calls the tools above, whatever it is asked."""

    model: str = "script"
    step: int = 0

    async def generate_content_async(
        self,
        llm_request: LlmRequest,  # noqa: ARG002 - it needs none
        stream: bool = False,  # noqa: ARG002, FBT001, FBT002 - as ADK has it
    ) -> AsyncGenerator[LlmResponse]:
        """Return the next step."""
        self.step += 1
        yield LlmResponse(content=Content(role="model", parts=[STEPS[self.step - 1]]))


async def main() -> None:
    """Let the agent work in a sandbox, and print what its tools and the agent say."""
    environment = X07Environment(memory="256M")
    tools = EnvironmentToolset(environment=environment)
    agent = LlmAgent(name="worker", model=Script(), tools=[tools])
    async with InMemoryRunner(agent=agent, app_name="example") as runner:
        session = await runner.session_service.create_session(app_name="example", user_id="me")
        asked = Content(role="user", parts=[Part.from_text(text="Print 42.")])
        async for event in runner.run_async(user_id="me", session_id=session.id, new_message=asked):
            for part in event.content.parts or []:
                if part.function_response:
                    print(part.function_response.name, part.function_response.response)
                elif part.text:
                    print(part.text)
    await environment.close()


if __name__ == "__main__":
    asyncio.run(main())
