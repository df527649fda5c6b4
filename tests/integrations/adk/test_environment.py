"""The environment of ADK, and an agent that uses it."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.examples import load
from x07_sandbox import SandboxError, apply
from x07_sandbox.integrations.adk import X07Environment


@pytest.fixture(scope="module")
def environment() -> Iterator[X07Environment]:
    """An environment for most tests."""
    environment = X07Environment(env={"GREETING": "hi"})
    asyncio.run(environment.initialize())
    yield environment
    asyncio.run(environment.close())


def test_commands_have_results(environment: X07Environment) -> None:
    """The agent reads both streams apart and the exit code, and commands start in the working folder."""
    result = asyncio.run(environment.execute("echo $GREETING; pwd; echo e >&2; exit 3"))
    assert (result.exit_code, result.stderr, result.timed_out) == (3, "e\n", False)
    assert result.stdout == f"hi\n{environment.working_dir}\n"
    assert asyncio.run(environment.execute("x" * 200_000)).exit_code == 126


def test_a_timeout_keeps_the_output(environment: X07Environment) -> None:
    """After a timeout the agent has the output so far and the reason, and the sandbox stays."""
    result = asyncio.run(environment.execute("echo started; sleep 60", timeout=1))
    assert (result.stdout, result.timed_out) == ("started\n", True)
    assert "time limit" in result.stderr
    assert asyncio.run(environment.execute("echo fine")).stdout == "fine\n"


def test_files_are_those_of_the_sandbox(environment: X07Environment) -> None:
    """Files are written with the folders above them, and a missing one is the usual error."""
    asyncio.run(environment.write_file(Path("a/b.txt"), "ä"))
    assert asyncio.run(environment.read_file(environment.working_dir / "a/b.txt")) == "ä".encode()
    with pytest.raises(FileNotFoundError):
        asyncio.run(environment.read_file(Path("missing")))
    assert not Path(environment.working_dir, "a").exists()


def test_changes_are_kept_and_not_applied(tmp_path: Path) -> None:
    """What the agent changes in a folder of the host waits for x07 apply; closing twice is harmless."""

    async def use() -> str:
        environment = X07Environment(workdir=tmp_path)
        with pytest.raises(RuntimeError, match="initialize"):
            await environment.execute("true")
        await environment.initialize()
        await environment.initialize()
        await environment.execute("echo 1 > new")
        run = environment._sandbox.id  # noqa: SLF001 - which x07 ps would show
        await environment.close()
        await environment.close()
        return run

    run = asyncio.run(use())
    assert list(tmp_path.iterdir()) == []
    apply(run)
    assert (tmp_path / "new").read_text() == "1\n"


def test_a_sandbox_that_cannot_be_opened_is_an_error() -> None:
    """The error of the sandbox says what to do."""
    with pytest.raises(SandboxError, match="no guest image"):
        asyncio.run(X07Environment(image="missing").initialize())


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The example's agent writes, edits and runs a program."""
    asyncio.run(load("adk_agent").main())
    printed = capsys.readouterr().out
    assert "'stdout': '42\\n'" in printed
    assert printed.endswith("The answer is 42.\n")
