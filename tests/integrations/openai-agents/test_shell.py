"""The executor of the shell tool, and an agent that uses it."""

import asyncio
from collections.abc import Iterator

import pytest
from agents import RunContextWrapper, ShellActionRequest, ShellCallData, ShellCommandRequest, ShellResult

from tests.examples import load
from x07_sandbox import AsyncSandbox, SandboxError
from x07_sandbox.integrations.openai_agents import X07Shell


@pytest.fixture(scope="module")
def sandbox() -> Iterator[AsyncSandbox]:
    """A sandbox for most tests."""
    sandbox = AsyncSandbox()
    asyncio.run(sandbox.open())
    yield sandbox
    asyncio.run(sandbox.close())


def ask(shell: X07Shell, *commands: str, timeout_ms: int | None = None, most: int | None = None) -> ShellResult:
    """Ask as the SDK does for a call of the model."""
    action = ShellActionRequest(list(commands), timeout_ms, most)
    return asyncio.run(shell(ShellCommandRequest(RunContextWrapper(None), ShellCallData("1", action))))


def test_each_command_has_an_answer(sandbox: AsyncSandbox) -> None:
    """The model reads both streams apart and the exit code of each command; files stay, folders of a shell do not."""
    result = ask(X07Shell(sandbox), "cd /tmp; echo 1 | tee /tmp/a; echo e >&2; exit 3", "pwd; cat /tmp/a; kill -9 $$")
    assert [(each.stdout, each.stderr, each.exit_code) for each in result.output] == [
        ("1\n", "e\n", 3),
        ("/opt/x07\n1\n", "", 137),
    ]
    assert [each.outcome.type for each in result.output] == ["exit", "exit"]


def test_a_timeout_ends_the_call(sandbox: AsyncSandbox) -> None:
    """What follows a timeout is not run, and the model cannot ask for more time than was set."""
    for shell, timeout_ms in ((X07Shell(sandbox), 1000), (X07Shell(sandbox, timeout_s=1), 3_600_000)):
        result = ask(shell, "echo started; sleep 60", "touch /tmp/next", timeout_ms=timeout_ms)
        assert [each.status for each in result.output] == ["timeout"]
        assert result.output[0].stdout == "started\n"
        assert "time limit" in result.output[0].stderr
    assert ask(X07Shell(sandbox), "test -e /tmp/next").output[0].exit_code == 1


def test_output_is_bounded(sandbox: AsyncSandbox) -> None:
    """Of much output the beginning and the end are kept, and the model may ask for less."""
    text = ask(X07Shell(sandbox), "seq 1000000").output[0].stdout
    assert len(text) < 66_000
    assert (text[:4], text[-8:]) == ("1\n2\n", "1000000\n")
    assert "bytes left out" in ask(X07Shell(sandbox), "seq 100", most=20).output[0].stdout


def test_a_command_that_is_too_long_is_an_answer(sandbox: AsyncSandbox) -> None:
    """What the kernel cannot execute is told to the model."""
    output = ask(X07Shell(sandbox), "echo " + "x" * 200_000).output[0]
    assert (output.exit_code, "131072 bytes" in output.stderr) == (126, True)


def test_a_closed_sandbox_is_an_error() -> None:
    """A sandbox that has ended is no failure of the command."""

    async def closed() -> AsyncSandbox:
        async with AsyncSandbox() as sandbox:
            return sandbox

    with pytest.raises(SandboxError):
        ask(X07Shell(asyncio.run(closed())), "true")


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The example's agent writes, corrects and runs a program."""
    asyncio.run(load("openai_shell").main())
    lines = capsys.readouterr().out.splitlines()
    assert "54" in lines
    assert lines[-1] == "The answer is 42."
