"""A deep agent (LangChain) whose backend is a sandbox. The model here is a script, so that the example runs offline.

    python examples/deep_agent.py

Needs: .venv/bin/pip install -e '.[deepagents]'
"""

from __future__ import annotations

from typing import Any, Self

from deepagents import create_deep_agent
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, ToolMessage

from x07_sandbox import Sandbox
from x07_sandbox.integrations.deepagents import X07Backend

STEPS = (
    ("write_file", {"file_path": "/opt/x07/greet.py", "content": "print('hello')\n"}),
    ("edit_file", {"file_path": "/opt/x07/greet.py", "old_string": "hello", "new_string": "good morning"}),
    ("execute", {"command": "python3 greet.py && ls"}),
)


class Script(GenericFakeChatModel):
    """A model that calls the tools above, whatever it is asked."""

    def bind_tools(self, *_tools: Any, **_options: Any) -> Self:  # noqa: ANN401 - any tools
        """Return the model, which needs no description of the tools."""
        return self


def script() -> Script:
    """Return the model."""
    calls = [
        AIMessage("", tool_calls=[{"name": name, "args": given, "id": str(number)}])
        for number, (name, given) in enumerate(STEPS)
    ]
    return Script(messages=iter([*calls, AIMessage("The program greets.")]))


def main() -> None:
    """Let the agent work in a sandbox, and print what its tools and the agent say."""
    with Sandbox(memory="256M") as sandbox:
        agent = create_deep_agent(model=script(), backend=X07Backend(sandbox))
        answer = agent.invoke({"messages": [("user", "Write a program that greets.")]})
    for message in answer["messages"]:
        if isinstance(message, ToolMessage):
            print(f"{message.name}: {message.text}")
    print(answer["messages"][-1].text)


if __name__ == "__main__":
    main()
