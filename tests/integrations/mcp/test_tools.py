"""What the tools of `x07 mcp` promise, with MCP's own client, over stdio and in process, in both protocol eras."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import subprocess
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from mcp import Client, MCPError

from tests.integrations.mcp.shared import (
    ENDLESS,
    ERAS,
    UNTIL_IT_IS_GONE,
    UNTIL_IT_RUNS,
    X07,
    call,
    over_stdio,
    refused,
    runs,
    text_of,
)
from x07_sandbox.integrations.mcp import make_server
from x07_sandbox.integrations.mcp_tools import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

FILES = ["sandbox_read", "sandbox_write", "sandbox_edit", "sandbox_list", "sandbox_search"]
TOOLS = ["run_code", "sandbox_open", "sandbox_exec", "sandbox_kill", *FILES, "sandbox_close"]


@asynccontextmanager
async def in_process(mode: str, **settings: Any) -> AsyncIterator[Client]:  # noqa: ANN401 - fields of Settings
    """Connect MCP's own client to a server in this process."""
    async with Client(make_server(Settings(**settings)), mode=mode) as client:
        yield client


async def opened(client: Client) -> str:
    """Open a sandbox, and return its handle."""
    return (await call(client, "sandbox_open"))[0]["sandbox"]


async def use_all_tools(client: Client) -> None:
    """Call each tool, and check what it answers."""
    tools = (await client.list_tools()).tools
    assert [tool.name for tool in tools] == TOOLS
    facts, output = await call(client, "run_code", language="python", code="print(6 * int(input()))", stdin="7")
    assert facts == {"state": "ended", "outcome": "ok", "exit_code": 0}
    assert "\n42\n" in output
    facts, output = await call(client, "run_code", language="c", code="int main( {")
    assert facts["outcome"] == "build-failed"
    assert output.count("expected declaration specifiers") == 1
    sandbox = await opened(client)
    facts, output = await call(client, "sandbox_exec", sandbox=sandbox, command="echo out; echo err >&2; exit 3")
    assert (facts["outcome"], facts["exit_code"]) == ("failed", 3)
    assert re.search(r"stdout\]\nout\n.*stderr\]\nerr\n", output, re.DOTALL)
    await call(client, "sandbox_write", sandbox=sandbox, path="new/data.bin", content="AAH/", base64=True)
    facts, output = await call(client, "sandbox_read", sandbox=sandbox, path="new/data.bin", base64=True)
    assert facts == {"bytes_of_file": 3, "offset": 0, "bytes": 3}
    assert base64.b64encode(b"\x00\x01\xff").decode() in output
    facts, output = await call(client, "sandbox_list", sandbox=sandbox, path="new")
    assert '{"name": "data.bin", "kind": "file", "size": 3}' in output
    await call(client, "sandbox_write", sandbox=sandbox, path="new/a.txt", content="one two")
    edited = {"path": "new/a.txt", "old": "two", "new": "three"}
    assert (await call(client, "sandbox_edit", sandbox=sandbox, **edited))[0] == {"replaced": 1}
    facts, output = await call(client, "sandbox_search", sandbox=sandbox, pattern="thre+", path="new")
    assert facts == {"lines": 1}
    assert "./new/a.txt:1:one three" in output
    assert (await call(client, "sandbox_close", sandbox=sandbox))[0] == {"state": "closed"}
    assert "Open a new one with sandbox_open" in await refused(client, "sandbox_exec", sandbox=sandbox, command="ls")


@pytest.mark.parametrize("mode", ERAS)
def test_all_tools_work_over_stdio(mode: str) -> None:
    """An assistant that speaks either era of the protocol can use every tool of the installed command."""

    async def main() -> None:
        async with over_stdio(mode) as client:
            await use_all_tools(client)

    asyncio.run(main())
    assert runs() == []


@pytest.mark.parametrize("mode", ERAS)
def test_a_long_command_answers_early_and_can_be_asked_for_again(mode: str) -> None:
    """A command that takes longer than an answer may goes on, reports progress, and gives its result later."""

    async def main() -> None:
        told: list[tuple[float, str | None]] = []

        async def progress(at: float, _total: float | None, message: str | None) -> None:
            told.append((at, message))

        async with over_stdio(mode, "--answer-after", "3") as client:
            sandbox = await opened(client)
            arguments = {"sandbox": sandbox, "command": "echo first; sleep 5; echo last; exit 4"}
            answer = await client.call_tool("sandbox_exec", arguments, progress_callback=progress)
            facts = json.loads(answer.content[0].text)
            assert facts["state"] == "running"
            assert "first" in text_of(answer)
            assert "running, 6 bytes of output" in [message for _, message in told]
            other = await opened(client)
            assert "another tool or sandbox" in await refused(
                client, "sandbox_exec", sandbox=other, running=facts["running"]
            )
            facts, output = await call(client, "sandbox_exec", sandbox=sandbox, running=facts["running"])
            assert (facts["state"], facts["exit_code"]) == ("ended", 4)
            assert "first\nlast\n" in output
            arguments["command"] = "echo begun; sleep 600"
            facts, _ = await call(client, "sandbox_exec", **arguments)
            assert "another sandbox" in await refused(client, "sandbox_kill", sandbox=other, running=facts["running"])
            facts, output = await call(client, "sandbox_kill", sandbox=sandbox, running=facts["running"])
            assert (facts["state"], "begun" in output) == ("killed", True)
            facts, _ = await call(client, "run_code", language="shell", code="sleep 4; echo done")
            facts, output = await call(client, "run_code", running=facts["running"])
            assert (facts["state"], "done" in output) == ("ended", True)

    asyncio.run(main())


@pytest.mark.parametrize("mode", ERAS)
def test_a_cancelled_call_kills_its_command(mode: str) -> None:
    """After a client has cancelled a call, the command does not run any more, and the sandbox is still usable."""

    async def main() -> None:
        async with over_stdio(mode) as client:
            sandbox = await opened(client)
            long = asyncio.create_task(client.call_tool("sandbox_exec", {"sandbox": sandbox, "command": ENDLESS}))
            facts, _ = await call(client, "sandbox_exec", sandbox=sandbox, command=UNTIL_IT_RUNS)
            assert facts["outcome"] == "ok"
            long.cancel()
            with pytest.raises(asyncio.CancelledError):
                await long
            facts, output = await call(client, "sandbox_exec", sandbox=sandbox, command=UNTIL_IT_IS_GONE)
            assert (facts["outcome"], "gone" in output) == ("ok", True)

    asyncio.run(main())


def test_a_timeout_kills_a_command_and_not_the_sandbox() -> None:
    """The server's limit of time holds, whatever the model asks for."""

    async def main() -> None:
        async with in_process("2026-07-28", timeout_s=2) as client:
            sandbox = await opened(client)
            facts, output = await call(
                client, "sandbox_exec", sandbox=sandbox, command="echo so far; sleep 60", timeout_s=500
            )
            assert facts["outcome"] == "timeout"
            assert "so far" in output
            assert (await call(client, "sandbox_exec", sandbox=sandbox, command="true"))[0]["outcome"] == "ok"

    asyncio.run(main())


def test_a_model_can_go_back_to_a_checkpoint_if_it_is_allowed_to() -> None:
    """With --checkpoints there are two more tools: one saves a moment, and the other brings its files back."""

    async def main() -> None:
        async with over_stdio("2026-07-28", "--checkpoints") as client:
            sandbox = await opened(client)
            await call(client, "sandbox_write", sandbox=sandbox, path="a.txt", content="one")
            facts, _ = await call(client, "sandbox_checkpoint", sandbox=sandbox)
            point = facts["checkpoint"]
            await call(client, "sandbox_write", sandbox=sandbox, path="a.txt", content="two")
            facts, _ = await call(client, "sandbox_rollback", sandbox=sandbox, checkpoint=point)
            assert facts == {"state": "rolled back", "checkpoint": point}
            _, output = await call(client, "sandbox_read", sandbox=sandbox, path="a.txt")
            assert "one" in output
            assert "there is none of this number" in await refused(
                client, "sandbox_rollback", sandbox=sandbox, checkpoint=point + 1
            )
        async with in_process("2026-07-28") as client:
            assert "sandbox_checkpoint" not in {tool.name for tool in (await client.list_tools()).tools}

    asyncio.run(main())


REFUSALS = [
    ("sandbox_open", {"policy": "built-in:default"}, "fixed by the person who started this server"),
    ("sandbox_open", {"backend": "none"}, "fixed by the person who started this server"),
    ("run_code", {"language": "cobol", "code": "x"}, "the image has no language cobol. Use python or c or cpp"),
    ("run_code", {"running": "made-up"}, "there is no command with the id made-up. Start it again."),
    ("sandbox_exec", {"sandbox": "made-up", "command": "ls"}, "Open a new one with sandbox_open"),
    ("sandbox_read", {"sandbox": "made-up", "path": "x" * 2000}, "wrong arguments for sandbox_read"),
]


@pytest.mark.parametrize("mode", ERAS)
def test_what_the_model_may_not_choose_is_refused_with_advice(mode: str, tmp_path: Path) -> None:
    """Another policy, image, host, folder or backend is refused, and the model is told what to do instead."""
    (tmp_path / "secret.txt").write_text("of the host")

    async def main() -> None:
        async with in_process(mode) as client:
            for tool, arguments, words in REFUSALS:
                assert words in await refused(client, tool, **arguments)
            sandbox = await opened(client)
            text = await refused(client, "sandbox_read", sandbox=sandbox, path=str(tmp_path / "secret.txt"))
            assert text.endswith("No such file or directory. Paths are those of the sandbox, not of the host.")
            outside = await refused(client, "sandbox_write", sandbox=sandbox, path="/usr/x", content="")
            assert "Write below the working folder, or in /tmp." in outside
            bad = await refused(client, "sandbox_write", sandbox=sandbox, path="x", content="!", base64=True)
            assert "is not base64" in bad
            with pytest.raises(MCPError, match="the tools are run_code"):
                await client.call_tool("sandbox_fork", {})

    asyncio.run(main())


def test_a_host_that_was_not_granted_is_denied_and_said_so() -> None:
    """A command that connects elsewhere fails, and the answer names what was granted and who can change it."""
    code = "import socket\ntry: socket.create_connection(('other.example', 443), 5)\nexcept OSError: exit('no way')"

    async def main() -> None:
        options = {"allow_hosts": ["granted.example:443"]}
        async with in_process("2026-07-28", options=options, about="Network: granted.example:443.") as client:
            facts, output = await call(client, "run_code", language="python", code=code)
            assert facts["outcome"] == "failed"
            assert "granted" not in facts  # the model has read it when the sandbox was opened
            assert facts["denied"] == "only the person who set this up can allow what was denied"
            assert re.search(r"denied\]\n.*other\.example", output)

    asyncio.run(main())


@pytest.mark.parametrize("apply", [False, True])
def test_changes_to_folders_are_kept_unless_the_server_applies_them(tmp_path: Path, apply: bool) -> None:  # noqa: FBT001
    """A sandbox's changes wait for a person; with --apply they reach the folder when the sandbox is closed."""
    folder = tmp_path / "work"
    folder.mkdir()

    async def main() -> dict[str, Any]:
        async with over_stdio("2026-07-28", "--workdir", str(folder), *(["--apply"] if apply else [])) as client:
            sandbox = await opened(client)
            await call(client, "sandbox_exec", sandbox=sandbox, command="echo new > made.txt")
            facts, output = await call(client, "sandbox_close", sandbox=sandbox)
            assert "made.txt" in output
            return facts

    facts = asyncio.run(main())
    assert facts["changes"]["state"] == ("applied" if apply else "kept")
    assert (folder / "made.txt").exists() is apply
    if not apply:
        subprocess.run([X07, "apply", facts["review"].rpartition(" ")[2]], check=True, capture_output=True)
        assert (folder / "made.txt").read_text() == "new\n"


def test_sandboxes_that_nobody_closes_end_by_their_idle_limit() -> None:
    """Fifty sandboxes that were opened and never closed are gone a while later, and never more than eight at once."""

    async def main() -> None:
        async with in_process("2026-07-28", idle_s=1, open_max=8) as client:
            handles, full = [], 0
            while len(handles) < 50:
                answer = await client.call_tool("sandbox_open", {})
                if answer.is_error:
                    assert "The limit of open sandboxes, 8, is reached" in text_of(answer)
                    full += 1
                    await asyncio.sleep(0.1)
                else:
                    handles.append(json.loads(answer.content[0].text)["sandbox"])
            assert len({*handles}) == 50
            async with asyncio.timeout(60):
                while await asyncio.to_thread(runs):  # noqa: ASYNC110 - of other processes
                    await asyncio.sleep(0.1)
            for handle in handles[-8:]:
                text = await refused(client, "sandbox_exec", sandbox=handle, command="ls")
                assert "it has ended" in text
                assert "1 s" in text

    asyncio.run(main())


def test_a_slow_close_answers_early_and_counts_until_it_ends(tmp_path: Path) -> None:
    """A sandbox that takes long to close keeps its place, and its end can be asked for again."""
    place = tmp_path / "project"
    place.mkdir()
    many = "for i in $(seq 5000); do echo $i > f$i; done; head -c 150000000 /dev/urandom > big"

    async def main() -> None:
        options = {"workdir": str(place)}
        async with in_process("2026-07-28", answer_s=1.5, open_max=1, options=options) as client:
            sandbox = await opened(client)
            facts, _ = await call(client, "sandbox_exec", sandbox=sandbox, command=many)
            while facts["state"] == "running":
                facts, _ = await call(client, "sandbox_exec", sandbox=sandbox, running=facts["running"])
            facts, _ = await call(client, "sandbox_close", sandbox=sandbox)
            assert facts["state"] == "closing"
            assert "The limit of open sandboxes, 1, is reached" in await refused(client, "sandbox_open")
            assert "being closed" in await refused(client, "sandbox_list", sandbox=sandbox, path=".")
            while facts["state"] == "closing":
                facts, _ = await call(client, "sandbox_close", sandbox=sandbox)
            assert facts["state"] == "closed"
            assert await opened(client)

    asyncio.run(main())


def test_a_model_is_told_where_it_is() -> None:
    """Instructions and the answer of sandbox_open name system, user, folder, memory, limits, hosts and programs."""

    async def main() -> None:
        flags = ("--memory", "700M", "--timeout", "77", "--allow-host", "granted.example:443")
        async with over_stdio("legacy", *flags) as client:
            text = (
                client.initialize_result.instructions if hasattr(client, "initialize_result") else client.instructions
            )
            facts, about = await call(client, "sandbox_open")
            for words in ("Debian", "ordinary user", "granted.example:443", "700 MiB", "77 s", "Missing: ", "git"):
                assert words in text
                assert words in facts["granted"]
            assert facts["time_limit_s"] == 77
            for words in ("system: Debian", "user: x07", "folder: /opt/x07", "programs: bash, python3", "missing: "):
                assert words in about
            tools = {tool.name: tool for tool in (await client.list_tools()).tools}
            languages = tools["run_code"].input_schema["properties"]["language"]["enum"]
            assert "python" in languages
            assert "javascript" not in languages

    asyncio.run(main())
