"""The tools of a sandbox in an agent of Strands, as docs/how-to/give-an-agent-a-tool.md attaches them."""

# ruff: noqa: ANN401 - types of the framework
from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import strands
from strands.models import Model

from x07_sandbox import Sandbox, tools

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Scripted(Model):
    """A model whose calls are written in advance. offered: the tools, as a model gets them."""

    def __init__(self, script: list[tuple[str, dict[str, Any]] | str]) -> None:
        self.script, self.offered = iter(script), []

    def update_config(self, **_options: Any) -> None:
        """Take no options."""

    def get_config(self) -> dict[str, Any]:
        """Return no options."""
        return {}

    def structured_output(self, *_words: Any, **_options: Any) -> Any:
        """Do nothing: the agent asks for text."""

    async def stream(self, _messages: Any, tool_specs: Any = None, *_words: Any, **_more: Any) -> AsyncIterator[Any]:
        """Yield the next message, in the events of Strands."""
        self.offered, one = tool_specs, next(self.script)
        name, arguments = one if isinstance(one, tuple) else ("", {})
        start = {"toolUse": {"name": name, "toolUseId": name}} if name else {}
        delta = {"toolUse": {"input": json.dumps(arguments)}} if name else {"text": one}
        yield {"messageStart": {"role": "assistant"}}
        yield {"contentBlockStart": {"start": start}}
        yield {"contentBlockDelta": {"delta": delta}}
        yield {"contentBlockStop": {}}
        yield {"messageStop": {"stopReason": "tool_use" if name else "end_turn"}}


def test_an_agent_uses_the_tools() -> None:
    """A model sees names, descriptions and typed arguments, writes a file, runs it, and reads an error."""
    model = Scripted(
        [
            ("write", {"path": "a.py", "content": "print(6 * 7)"}),
            ("run", {"argv": ["python3", "a.py"]}),
            ("read", {"path": "/none"}),
            "done",
        ]
    )
    with Sandbox() as sandbox:
        box = tools(sandbox)
        agent = strands.Agent(model=model, tools=[strands.tool(each) for each in box], callback_handler=None)
        assert str(agent("Compute it.")).strip() == "done"
    results = [block["toolResult"] for one in agent.messages for block in one["content"] if "toolResult" in block]
    assert [one["content"][0]["text"] for one in results] == [
        "bytes: 12",
        "outcome: ok; exit code: 0\noutput:\n42\n",
        "error: cannot read /none: No such file or directory. Paths are those of the sandbox, not of the host.",
    ]
    ours = {one["name"]: one["parameters"]["properties"] for one in box.definitions}
    offered = {one["name"]: one["inputSchema"]["json"]["properties"] for one in model.offered}
    assert {name: set(fields) for name, fields in offered.items()} == {name: set(found) for name, found in ours.items()}
