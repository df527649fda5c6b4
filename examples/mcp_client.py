"""Use `x07 mcp` from a program, with MCP's own client, as an assistant does.

    .venv/bin/pip install -e '.[mcp]'
    python examples/mcp_client.py

Each answer has a block with facts, as JSON. If there is output, a second block has it, marked as untrusted.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from mcp import Client, StdioServerParameters


async def call(client: Client, tool: str, **arguments: object) -> dict[str, Any]:
    """Call a tool, print its answer, and return the facts."""
    answer = await client.call_tool(tool, arguments)
    for block in answer.content:
        print(block.text)
    if answer.is_error:
        sys.exit(f"{tool} was refused")
    facts: dict[str, Any] = json.loads(answer.content[0].text)
    return facts


async def main() -> None:
    """Open a sandbox, and work in it."""
    server = StdioServerParameters(command="x07", args=["mcp", "--memory", "256M"], env=dict(os.environ))
    async with Client(server) as client:
        sandbox = (await call(client, "sandbox_open"))["sandbox"]
        await call(client, "sandbox_write", sandbox=sandbox, path="answer.py", content="print(6 * 7)\n")
        facts = await call(client, "sandbox_exec", sandbox=sandbox, command="sleep 1; python3 answer.py")
        while facts["state"] == "running":
            facts = await call(client, "sandbox_exec", sandbox=sandbox, running=facts["running"])
        await call(client, "sandbox_close", sandbox=sandbox)


if __name__ == "__main__":
    asyncio.run(main())
