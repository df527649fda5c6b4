"""The tools of a sandbox in an agent of LangChain, as docs/how-to/give-an-agent-a-tool.md attaches them."""

# ruff: noqa: ANN401 - types of the framework
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langchain.agents import create_agent
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import Field

from x07_sandbox import Sandbox, tools

if TYPE_CHECKING:
    from collections.abc import Sequence


class Scripted(GenericFakeChatModel):
    """A model whose calls are written in advance. offered: the tools, as a model gets them."""

    offered: list[dict[str, Any]] = Field(default_factory=list)

    def bind_tools(self, tools: Sequence[Any], **_options: Any) -> Scripted:
        """Note what the model is offered."""
        self.offered[:] = [convert_to_openai_tool(tool)["function"] for tool in tools]
        return self


def calling(name: str, **arguments: object) -> AIMessage:
    """Return the message of a model that calls a tool."""
    return AIMessage("", tool_calls=[{"name": name, "args": arguments, "id": name}])


def test_an_agent_uses_the_tools() -> None:
    """A model sees names, descriptions and typed arguments, writes a file, runs it, and reads an error."""
    script = [
        calling("write", path="a.py", content="print(6 * 7)"),
        calling("run", argv=["python3", "a.py"]),
        calling("read", path="/none"),
        AIMessage("done"),
    ]
    with Sandbox() as sandbox:
        model = Scripted(messages=iter(script))
        box = tools(sandbox)
        agent = create_agent(model, tools=list(box))
        found = agent.invoke({"messages": [("user", "Compute it.")]})["messages"]
    assert [one.content for one in found if isinstance(one, ToolMessage)] == [
        "bytes: 12",
        "outcome: ok; exit code: 0\noutput:\n42\n",
        "error: cannot read /none: No such file or directory. Paths are those of the sandbox, not of the host.",
    ]
    assert found[-1].content == "done"
    assert [one["name"] for one in model.offered] == [one["name"] for one in box.definitions]
    for offered, ours in zip(model.offered, box.definitions, strict=True):
        assert offered["description"] == ours["description"]
        for name, field in ours["parameters"]["properties"].items():
            assert offered["parameters"]["properties"][name]["description"] == field["description"]
            assert offered["parameters"]["properties"][name]["type"] == field["type"]
