"""How the process `x07 mcp` starts and ends, and its tasks."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import mcp_types as types
import pytest
from mcp import MCPError
from mcp.client.extension import ClaimContext, ClientExtension, ResultClaim

from tests.integrations.mcp.shared import ENDLESS, UNTIL_IT_IS_GONE, X07, call, descendants, over_stdio, runs, text_of
from x07_sandbox.integrations.mcp import TASKS


class Wire:
    """A client that speaks to the server without a library, so that the process can be killed at any moment."""

    def __init__(self, *flags: str) -> None:
        self.process = subprocess.Popen(
            [X07, "mcp", *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.ask("initialize", protocolVersion="2025-11-25", capabilities={}, clientInfo={"name": "t", "version": "1"})
        self.send("notifications/initialized")

    def send(self, method: str, **message: object) -> None:
        """Send a message without waiting for an answer."""
        line = {"jsonrpc": "2.0", "method": method, **message}
        self.process.stdin.write(json.dumps(line).encode() + b"\n")
        self.process.stdin.flush()

    def ask(self, method: str, **params: object) -> dict[str, Any]:
        """Send a request, and return its result."""
        self.send(method, id=1, params=params)
        while "result" not in (answer := json.loads(self.process.stdout.readline())):
            assert "error" not in answer, answer
        return answer["result"]

    def call(self, tool: str, **arguments: object) -> dict[str, Any]:
        """Call a tool, and return the facts of its answer."""
        answer = self.ask("tools/call", name=tool, arguments=arguments)
        return json.loads(answer["content"][0]["text"])

    def in_mid_command(self) -> str:
        """Open a sandbox, start a long command in it, and return the sandbox once the command runs."""
        sandbox = self.call("sandbox_open")["sandbox"]
        command = "echo new > made.txt; touch started; sleep 600"
        self.send(
            "tools/call", id=2, params={"name": "sandbox_exec", "arguments": {"sandbox": sandbox, "command": command}}
        )
        waiting = "while [ ! -e started ]; do sleep 0.1; done"
        assert self.call("sandbox_exec", sandbox=sandbox, command=waiting)["outcome"] == "ok"
        return sandbox


def wait_for_the_end_of(pids: set[int], within_s: float) -> None:
    """Wait until no process of *pids* is left."""
    until = time.monotonic() + within_s
    while left := {pid for pid in pids if os.path.exists(f"/proc/{pid}")}:  # noqa: PTH110 - a bare check
        assert time.monotonic() < until, left
        time.sleep(0.1)


def test_a_server_killed_in_mid_command_leaves_nothing() -> None:
    """After SIGKILL, the VM and all helpers end, and nothing is left after the next sweep."""
    wire = Wire()
    wire.in_mid_command()
    started = descendants(wire.process.pid)
    assert len(started) > 1
    wire.process.kill()
    wire.process.wait()
    wait_for_the_end_of(started, 30)
    found = [json.loads(subprocess.run([X07, "sweep", "--json"], check=True, capture_output=True).stdout) for _ in "12"]
    # Images and saved VMs are this user's, and may have become too many.
    assert [one["kind"] for one in found[0]["removed"] if one["kind"] == "job"] == ["job"]
    assert (found[1]["removed"], found[1]["kept"]) == ([], [])
    assert runs() == []


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (None, 0)]
)
def test_a_server_that_is_asked_to_end_keeps_changes(tmp_path: Path, number: int | None, code: int) -> None:
    """A signal or the end of standard input ends all sandboxes; changes to folders are kept for a person."""
    folder = tmp_path / "work"
    folder.mkdir()
    wire = Wire("--workdir", str(folder))
    wire.in_mid_command()
    started = descendants(wire.process.pid)
    if number is None:
        wire.process.stdin.close()
    else:
        wire.process.send_signal(number)
    assert wire.process.wait(60) == code, wire.process.stderr.read()
    wait_for_the_end_of(started, 10)
    assert runs() == []
    assert [*folder.iterdir()] == []
    run = next((tmp_path / "home").glob("**/sandbox.json")).parent.name
    diff = subprocess.run([X07, "diff", run], check=True, capture_output=True)
    assert b"made.txt" in diff.stdout


def test_a_server_whose_client_is_gone_ends() -> None:
    """If the client dies, the server and its sandboxes end, and it reports no error."""
    wire = Wire()
    wire.in_mid_command()
    started = descendants(wire.process.pid)
    wire.process.stdout.close()
    wire.send("ping", id=3)
    wire.process.stdin.close()
    assert wire.process.wait(60) == 0, wire.process.stderr.read()
    wait_for_the_end_of(started, 10)


def refusal(*flags: str, **env: str) -> tuple[int, str]:
    """Start the server, which must end by itself. Return its exit code and its message."""
    command, env = [X07, "mcp", *flags], os.environ | env
    done = subprocess.run(command, check=False, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return done.returncode, done.stderr


def test_a_server_that_could_not_serve_refuses_to_start(tmp_path: Path) -> None:
    """A missing image, policy or folder is an error of the start, with advice, and not of each call."""
    code, text = refusal(X07_VM_CACHE_DIR=str(tmp_path / "empty"))
    assert (code, "Run x07 image build" in text) == (125, True)
    code, text = refusal("--policy", str(tmp_path / "none.json"))
    assert (code, "none.json" in text) == (2, True)
    code, text = refusal("--workdir", str(tmp_path / "nowhere"))
    assert (code, "nowhere" in text) == (2, True)
    code, text = refusal("--backend", "none")
    assert (code, "weaker" in text) == (125, True)


def test_the_example_works() -> None:
    """The example opens a sandbox, works in it and closes it."""
    example = Path(__file__).parents[3] / "examples" / "mcp_client.py"
    path = f"{Path(X07).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, example], check=True, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert "stdout]\n42\n" in done.stdout
    assert done.stdout.endswith('{"state": "closed"}\n')


class Created(types.Result):
    """The result of a call that became a task."""

    result_type: Literal["task"] = "task"
    task_id: str
    status: str
    poll_interval_ms: int


class TaskRequest(types.Request[Any, str]):
    """tasks/get or tasks/cancel."""

    method: str
    params: Any


class State(types.Result):
    """The answer to tasks/get."""

    task_id: str = ""
    status: str = ""
    result: Any = None


class Tasks(ClientExtension):
    """The client's side of the Tasks extension, as far as the tests need it."""

    identifier = TASKS

    def __init__(self, *, cancel: bool = False) -> None:
        self.seen: list[str] = []
        self.cancel = cancel

    def claims(self) -> list[ResultClaim[Any]]:
        """Return the shape of a call that became a task."""
        return [ResultClaim(result_type="task", model=Created, resolve=self.resolve)]

    async def resolve(self, created: Created, ctx: ClaimContext) -> types.CallToolResult:
        """Poll for the result of a task, or cancel it."""

        async def ask(method: str) -> State:
            request = TaskRequest(method=method, params={"taskId": created.task_id})
            return await ctx.session.send_request(request, State)

        assert created.status == "working"
        if self.cancel:
            await ask("tasks/cancel")
        while (state := await ask("tasks/get")).status == "working":
            self.seen.append(state.status)
            await asyncio.sleep(created.poll_interval_ms / 1000)
        self.seen.append(state.status)
        empty = {"content": [{"type": "text", "text": state.status}]}
        return types.CallToolResult.model_validate(state.result or empty)


def test_a_long_command_is_a_task_for_a_client_that_knows_tasks() -> None:
    """With the Tasks extension of 2026-07-28, a client polls for the result, and the model sees only the result."""

    async def main() -> None:
        tasks = Tasks()
        async with over_stdio("2026-07-28", extensions=[tasks]) as client:
            sandbox = (await call(client, "sandbox_open"))[0]["sandbox"]
            facts, output = await call(client, "sandbox_exec", sandbox=sandbox, command="sleep 8; echo late; exit 3")
            assert (facts["state"], facts["exit_code"], "late" in output) == ("ended", 3, True)
            assert tasks.seen[-1] == "completed"
            assert "working" in tasks.seen
            tasks.cancel = True
            answer = await client.call_tool("sandbox_exec", {"sandbox": sandbox, "command": ENDLESS})
            assert text_of(answer) == "cancelled"
            assert "gone" in (await call(client, "sandbox_exec", sandbox=sandbox, command=UNTIL_IT_IS_GONE))[1]

    asyncio.run(main())


def test_tasks_are_only_for_clients_that_declare_them() -> None:
    """A client without the extension gets -32021 for tasks/get, and one with it -32602 for a task that is not there."""

    async def ask(*extensions: ClientExtension) -> int:
        async with over_stdio("2026-07-28", extensions=extensions) as client:
            with pytest.raises(MCPError) as caught:
                await client.session.send_request(TaskRequest(method="tasks/get", params={"taskId": "x"}), State)
            return caught.value.code

    assert asyncio.run(ask()) == -32021
    assert asyncio.run(ask(Tasks())) == -32602
