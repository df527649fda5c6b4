"""A code agent of smolagents whose Python is in a sandbox. The model here is a script, so that it runs offline.

    python examples/smolagents_agent.py

Needs: .venv/bin/pip install -e '.[smolagents]'
"""

from __future__ import annotations

from typing import Any

from smolagents import ChatMessage, CodeAgent, LogLevel, MessageRole, Model, tool

from x07_sandbox import Sandbox
from x07_sandbox.integrations.smolagents import X07Executor

STEPS = (
    "<code>\nnumbers = [6, 7]\nprint(len(numbers))\n</code>",
    "<code>\nfinal_answer({'answer': multiply(*numbers)})\n</code>",
)


@tool
def multiply(a: int, b: int) -> int:
    """Multiply two numbers.

    Args:
        a: the first one
        b: the second one

    """
    return a * b


class Script(Model):
    """A model that writes the code above, whatever it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self._steps = iter(STEPS)

    def generate(self, *_messages: Any, **_options: Any) -> ChatMessage:  # noqa: ANN401 - any messages
        """Return the next step."""
        return ChatMessage(role=MessageRole.ASSISTANT, content=next(self._steps))


def main() -> None:
    """Let the agent work in a sandbox, and print its answer."""
    with Sandbox(memory="256M") as sandbox:
        executor = X07Executor(sandbox)
        with CodeAgent([multiply], Script(), executor=executor, verbosity_level=LogLevel.ERROR) as agent:
            print(agent.run("Multiply 6 by 7."))


if __name__ == "__main__":
    main()
