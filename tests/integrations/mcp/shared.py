"""What the tests of `x07 mcp` share: the installed command, short calls, and lists of what runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcp import Client, StdioServerParameters

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from mcp_types import CallToolResult

X07 = str(Path(sys.executable).parent / "x07")
ERAS = ("legacy", "2026-07-28")
# Commands of a sandbox: one that runs until it is killed, and others that wait until it runs, and until it is gone.
ENDLESS = "echo $$ > pid; exec sleep 999"
UNTIL_IT_RUNS = "while [ ! -s pid ]; do sleep 0.1; done; kill -0 $(cat pid)"
UNTIL_IT_IS_GONE = "while kill -0 $(cat pid); do sleep 0.1; done; echo gone"


@asynccontextmanager
async def over_stdio(mode: str, *flags: str, **options: Any) -> AsyncIterator[Client]:  # noqa: ANN401 - of Client
    """Connect MCP's own client to the installed command."""
    server = StdioServerParameters(command=X07, args=["mcp", *flags], env=dict(os.environ))
    async with Client(server, mode=mode, **options) as client:
        yield client


async def call(client: Client, tool: str, **arguments: object) -> tuple[dict[str, Any], str]:
    """Return the facts of an answer and its untrusted text. The call must not be refused."""
    answer = await client.call_tool(tool, arguments)
    assert not answer.is_error, text_of(answer)
    return json.loads(answer.content[0].text), "".join(block.text for block in answer.content[1:])


async def refused(client: Client, tool: str, **arguments: object) -> str:
    """Return the text with which a call is refused."""
    answer = await client.call_tool(tool, arguments)
    assert answer.is_error, text_of(answer)
    return text_of(answer)


def text_of(answer: CallToolResult) -> str:
    """Return all text of an answer."""
    return "\n".join(block.text for block in answer.content)


def runs() -> list[dict[str, Any]]:
    """Return the runs in progress, as `x07 ps` lists them."""
    done = subprocess.run([X07, "ps", "--json"], check=True, capture_output=True)
    return json.loads(done.stdout)["jobs"]


def descendants(pid: int) -> set[int]:
    """Return the processes that a process has started, directly or not."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found: set[int] = set()
    todo = [pid]
    while todo:
        new = parents.get(todo.pop(), [])
        found |= {*new}
        todo += new
    return found
