"""The sandbox client: what its sessions do, terminals, resuming by id and from a snapshot, and an agent in one."""

import asyncio
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agents import RunConfig, Runner
from agents.sandbox import SandboxAgent, SandboxRunConfig
from agents.sandbox.entries import File, GCSMount, InContainerMountStrategy, RcloneMountPattern
from agents.sandbox.errors import (
    ConfigurationError,
    ExecTimeoutError,
    ExecTransportError,
    InvalidManifestPathError,
    WorkspaceReadNotFoundError,
)
from agents.sandbox.manifest import Manifest
from agents.sandbox.snapshot import LocalSnapshotSpec
from agents.testing import ScriptedModel, assistant_message, function_call

from x07_sandbox import Sandbox, SandboxError
from x07_sandbox.integrations.openai_sandbox import X07Options, X07SandboxClient

MANIFEST = Manifest(entries={"a.txt": File(content=b"hello")}, environment={"value": {"GREETING": "hi"}})


class Opened:
    """A session, for callers without an event loop."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self.runner = runner
        self.session = runner.run(X07SandboxClient().create(manifest=MANIFEST))
        runner.run(self.session.start())

    def __call__(self, method: str, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - of many types
        """Call a method."""
        return self.runner.run(getattr(self.session, method)(*args, **options))


@pytest.fixture(scope="module")
def opened() -> Iterator[Opened]:
    """A session for most tests."""
    with asyncio.Runner() as runner:
        opened = Opened(runner)
        yield opened
        opened("aclose")


def test_commands_run_in_the_workspace(opened: Opened) -> None:
    """The workspace has the files and variables of the manifest, and a failure is a result."""
    result = opened("exec", "cat a.txt; echo $GREETING; pwd; echo e >&2; exit 3")
    assert (result.stdout, result.stderr, result.exit_code) == (b"hellohi\n/workspace\n", b"e\n", 3)
    assert opened("exec", "printf", "%s|", "a b", shell=False).stdout == b"a b|"
    with pytest.raises(ExecTimeoutError):
        opened("exec", "sleep 60", timeout=1)
    with pytest.raises(ExecTransportError, match="131072 bytes"):
        opened("exec", "x" * 200_000)
    with pytest.raises(ConfigurationError, match="leave out the user"):
        opened("exec", "true", user="bob")


def test_files_stay_in_the_workspace(opened: Opened) -> None:
    """Files are read and written, and links do not lead out of the workspace."""
    opened("write", Path("sub/b.bin"), io.BytesIO(b"\0\1"))
    assert opened("read", Path("sub/b.bin")).read() == b"\0\1"
    assert opened("read_bounded", Path("a.txt"), max_bytes=2) == b"he"
    assert {Path(entry.path).name for entry in opened("ls", ".")} >= {"a.txt", "sub"}
    with pytest.raises(WorkspaceReadNotFoundError):
        opened("read", Path("missing"))
    opened("exec", "ln -s /etc out")
    for path in ("out/passwd", "../etc/passwd"):
        with pytest.raises(InvalidManifestPathError):
            opened("read", Path(path))
        with pytest.raises(InvalidManifestPathError):
            opened("write", Path(path), io.BytesIO(b"1"))


def test_a_terminal_stays_between_calls(opened: Opened) -> None:
    """A process with a terminal reads what is typed, and its end has an exit code."""
    update = opened("pty_exec_start", "test -t 0 && exec cat", tty=True, yield_time_s=1)
    assert update.exit_code is None
    again = opened("pty_write_stdin", session_id=update.process_id, chars="typed\n", yield_time_s=1)
    assert again.output == b"typed\r\ntyped\r\n"
    last = opened("pty_write_stdin", session_id=update.process_id, chars="\4", yield_time_s=5)
    assert (last.exit_code, last.process_id) == (0, None)


def test_a_process_without_a_terminal_can_be_followed(opened: Opened) -> None:
    """A long command returns its output so far, is asked again, and is killed with all others."""
    first = opened("pty_exec_start", "echo one; sleep 1; echo two >&2; sleep 60", yield_time_s=0.5)
    assert (first.output, first.exit_code) == (b"one\n", None)
    assert opened("pty_write_stdin", session_id=first.process_id, chars="").output == b"two\n"
    opened("pty_terminate_all")
    short = opened("pty_exec_start", "echo done; exit 4", yield_time_s=10)
    assert (short.output, short.exit_code, short.process_id) == (b"done\n", 4, None)


def test_a_session_is_resumed_by_its_id(tmp_path: Path) -> None:
    """A kept sandbox is found by the stored state; if it has ended, another gets the files of the snapshot."""
    client = X07SandboxClient()

    async def use() -> None:
        options, snapshot = X07Options(keep=True, idle_s=300), LocalSnapshotSpec(base_path=tmp_path)
        async with await client.create(manifest=MANIFEST, snapshot=snapshot, options=options) as session:
            await session.exec("echo 1 > new; echo 2 > /root/outside")
        stored = json.dumps(client.serialize_session_state(session.state))

        same = await client.resume(client.deserialize_session_state(json.loads(stored)))
        assert same.state.sandbox_id == session.state.sandbox_id
        async with same:
            assert (await same.exec("cat a.txt new /root/outside")).stdout == b"hello1\n2\n"
        Sandbox.connect(same.state.sandbox_id).kill()

        other = await client.resume(client.deserialize_session_state(json.loads(stored)))
        assert other.state.sandbox_id != session.state.sandbox_id
        try:
            async with other:
                assert (await other.exec("cat a.txt new; ls /root/outside")).stdout == b"hello1\n"
        finally:
            Sandbox.connect(other.state.sandbox_id).kill()

    asyncio.run(use())


def test_an_agent_works_in_a_sandbox() -> None:
    """The SDK's own tools run commands in the sandbox, which ends with the run."""
    steps = [
        [function_call("exec_command", {"cmd": "cat a.txt; echo; echo 42 > answer; cat answer"}, call_id="1")],
        [assistant_message("The answer is 42.")],
    ]
    agent = SandboxAgent("worker", model=ScriptedModel(steps), default_manifest=MANIFEST)
    config = RunConfig(
        tracing_disabled=True, sandbox=SandboxRunConfig(client=X07SandboxClient(), options=X07Options(memory="300M"))
    )
    before = {each.id for each in Sandbox.list()}
    result = asyncio.run(Runner.run(agent, "Print 42.", run_config=config))
    outputs = [item.output for item in result.new_items if item.type == "tool_call_output_item"]
    assert "hello\n42\n" in outputs[0]
    assert result.final_output == "The answer is 42."
    assert {each.id for each in Sandbox.list()} <= before


def test_what_is_not_possible_is_refused() -> None:
    """Mounts and missing images are errors before a VM starts."""
    mount = GCSMount(bucket="b", mount_strategy=InContainerMountStrategy(pattern=RcloneMountPattern()))
    with pytest.raises(Exception, match="mounts nothing"):
        asyncio.run(X07SandboxClient().create(manifest=Manifest(entries={"data": mount})))
    with pytest.raises(SandboxError, match="no guest image"):
        asyncio.run(X07SandboxClient().create(options=X07Options(image="missing")))
