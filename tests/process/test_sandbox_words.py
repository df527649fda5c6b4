"""What the result and the commands say of a sandbox, with a sandbox that needs no VM."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.command import x07
from x07_sandbox import Sandbox, SandboxError, UsageError
from x07_sandbox.records.listing import list_jobs

if TYPE_CHECKING:
    from collections.abc import Callable

WAIT_S = 60.0


@pytest.fixture(autouse=True)
def accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept a sandbox that is not isolated."""
    monkeypatch.setenv("X07_I_ACCEPT_WEAKER_ISOLATION", "1")


def test_a_reason_names_the_lifetime_that_ended_the_sandbox() -> None:
    """After `extend`, the reason names the lifetime that ended the sandbox, and the result has the time it was open."""
    sandbox = Sandbox(backend="none", lifetime_s=3600)
    sandbox.extend(0.2)
    sleeper = sandbox.start(["sleep", "60"])
    with pytest.raises(SandboxError, match="it reached its lifetime"):
        sleeper.wait(WAIT_S)
    result = sandbox.close()
    assert result.reason == "the sandbox reached its lifetime of 0.2 s after it was extended"
    times = result.phases["run"].times_ms
    assert times["end"] - times["opened"] >= 200


def test_ps_shows_a_sandbox_s_name_and_lifetime(tmp_path: Path) -> None:
    """`x07 ps` shows the name of a sandbox, and the time until its lifetime ends, also after `extend`."""
    with Sandbox.create(backend="none", name="demo", lifetime_s=3000) as sandbox:
        try:
            (line,) = list_jobs().jobs
            assert (line.run, line.sandbox) == (sandbox.id, "demo")
            assert line.left_s is not None
            assert 2900 < line.left_s <= 3000
            row = x07(tmp_path, "ps").out.decode().splitlines()[1].split()
            assert row[-2:] == ["sandbox", "demo"]
            assert row[-3].startswith("49m")
            sandbox.extend(100)
            left_s = list_jobs().jobs[0].left_s
            assert left_s is not None
            assert left_s <= 100
        finally:
            sandbox.close()


@pytest.mark.parametrize("open_one", [Sandbox, Sandbox.create])
def test_a_command_that_ended_with_its_sandbox_raises(open_one: Callable[..., Sandbox]) -> None:
    """After a close, waiting for a command that ran until then raises; one that had ended before has its end."""
    sandbox = open_one(backend="none")
    early, late = sandbox.start(["true"]), sandbox.start(["sleep", "600"])
    assert early.read() == b""  # it has ended
    sandbox.close()
    with pytest.raises(SandboxError, match="it was closed"):
        late.wait(WAIT_S)
    assert early.wait(WAIT_S).ok


def test_a_command_that_is_killed_right_after_its_start_ends_alone() -> None:
    """A kill that arrives before the command has a session of its own leaves the sandbox as it was."""
    with Sandbox(backend="none") as sandbox:
        for _ in range(60):
            process = sandbox.start(["sleep", "600"])
            process.kill()
            assert process.wait(60).signal == signal.SIGKILL
        assert sandbox.exec(["true"]).ok


@pytest.mark.parametrize("open_one", [Sandbox, Sandbox.create])
def test_words_that_no_system_call_can_take_are_usage_errors(open_one: Callable[..., Sandbox]) -> None:
    """A wrong word, variable or folder of a command is an error that names it, and the sandbox stays open."""
    surrogate = "contains a lone surrogate"
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (["echo", "\ud800"], {}, f"argument 1 {surrogate}"),
        (["\ud800"], {}, f"argument 0 {surrogate}"),
        (["env"], {"env": {"A": "\ud800"}}, f"the value {surrogate}"),
        (["env"], {"cwd": "\ud800"}, f"its path {surrogate}"),
        ([""], {}, "its name is empty"),
        ([3], {}, "argument 0 is not a string"),
        (["echo", b"1"], {}, "argument 1 is not a string"),
        (["env"], {"env": {"A": b"1"}}, "the variable 'A' is not a string"),
        (["env"], {"cwd": b"/"}, "the folder is not a string"),
        (iter([]), {}, "not a list with at least one word"),
    ]
    with open_one(backend="none") as sandbox:
        try:
            for argv, options, why in cases:
                with pytest.raises(UsageError, match=why):
                    sandbox.exec(argv, **options)
            assert sandbox.exec(["echo", "\udcff"]).stdout == b"\xff\n"
        finally:
            sandbox.close()


def test_a_command_has_a_name_in_the_result_and_its_reason_the_keyword() -> None:
    """The result names a command by its first word, and a reached limit by the keyword that set it."""
    with Sandbox(backend="none", cpu_s=1) as sandbox:
        ended = sandbox.exec(["sh", "-c", "while :; do :; done"])
        assert (ended.outcome, ended.reason) == ("cpu-limit", "the program reached its CPU time limit of 1 s (cpu_s)")
        with pytest.raises(SandboxError, match="no-such"):
            sandbox.exec(["no-such\udcff" + "x" * 200], check=True)
    names = [command.name for command in sandbox.close().commands]
    assert names == ["sh", "no-such\\xff" + "x" * 89]
