"""A workspace whose caller goes away, whose sandbox cannot be opened, and an agent that works in one."""

import asyncio

import pytest
from pydantic_ai.workspaces import WorkspaceOutputLimitError, WorkspaceRef, WorkspaceUnavailableError

from tests.examples import load
from x07_sandbox import AsyncSandbox, SandboxError
from x07_sandbox.integrations.pydantic_ai import X07Workspace

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    """The event loop of the tests."""
    return "asyncio"


async def test_a_caller_that_is_cancelled_leaves_the_sandbox_with_its_ref() -> None:
    """A sandbox that is opened while its caller is cancelled can be found, and is used by the next caller."""
    workspace = X07Workspace()
    first = asyncio.create_task(workspace.working_dir())
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    result = await workspace.run(["echo", "here"])
    assert result.stdout == "here\n"
    await (await AsyncSandbox.connect(workspace.ref.id)).kill()


async def test_a_sandbox_that_cannot_be_opened_is_an_error_each_time() -> None:
    """A wrong option is the error of Sandbox, for each caller, and there is no ref."""
    workspace = X07Workspace(image="no-such-image")
    for _ in range(2):
        with pytest.raises(SandboxError, match="no-such-image"):
            await workspace.working_dir()
    assert workspace.ref is None


async def test_a_ref_that_names_nothing_is_unavailable() -> None:
    """A workspace never opens another sandbox in place of one that has ended."""
    workspace = X07Workspace(WorkspaceRef(provider="x07", id="no-such-sandbox"))
    with pytest.raises(WorkspaceUnavailableError):
        await workspace.run(["true"])


async def test_output_that_is_not_complete_is_an_error() -> None:
    """A command with more output than a result holds raises, with the beginning of the output."""
    workspace = X07Workspace()
    with pytest.raises(WorkspaceOutputLimitError) as raised:
        await workspace.run(["head", "-c", "12000000", "/dev/zero"])
    assert len(raised.value.stdout) == raised.value.limit
    await (await AsyncSandbox.connect(workspace.ref.id)).kill()


async def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The example's agent writes a file and runs it."""
    await load("pydantic_ai_agent").main()
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["$ python3 primes.py", "[2, 3, 5, 7]", "There are four primes below ten."]
