"""Evaluations in Inspect whose tools work in a sandbox."""

import json
from pathlib import Path

import pytest
from inspect_ai import Task, eval  # noqa: A004 - Inspect's name
from inspect_ai.dataset import Sample
from inspect_ai.log import EvalSample
from inspect_ai.model import ChatMessageTool, ModelOutput, ModelUsage, get_model
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import Tool, bash, bash_session, python, text_editor
from inspect_ai.util import SandboxEnvironmentSpec, SandboxUserUnsupportedError

from tests.examples import EXAMPLES, load
from x07_sandbox.integrations.inspect_ai import X07Config, X07SandboxEnvironment


def sample_after(calls: list[tuple[str, dict]], tools: list[Tool], logs: Path, **of_sample: object) -> EvalSample:
    """Return the sample of an evaluation in which the model makes these calls."""
    answers = [ModelOutput.for_tool_call("mockllm/model", name, given) for name, given in calls]
    answers.append(ModelOutput.from_content("mockllm/model", "done"))
    for answer in answers:
        answer.usage = ModelUsage()
    task = Task(dataset=[Sample(input="Go.", **of_sample)], solver=[use_tools(tools), generate()], sandbox="x07")
    model = get_model("mockllm/model", custom_outputs=answers)
    [log] = eval(task, model=model, log_dir=str(logs), display="none")
    assert log.status == "success", log.error
    return log.samples[0]


def answers_of(sample: EvalSample) -> list[str]:
    """Return what the tools said."""
    for message in sample.messages:
        assert not isinstance(message, ChatMessageTool) or message.error is None, message.error
    return [message.text for message in sample.messages if isinstance(message, ChatMessageTool)]


def test_commands_and_code_share_a_sandbox(tmp_path: Path) -> None:
    """The tools bash and python see the files and the set-up script of their sample."""
    calls = [
        ("bash", {"command": "cat notes/a.txt; echo three > c.txt; id -un"}),
        ("python", {"code": "print(open('b.txt').read(), open('c.txt').read())"}),
    ]
    sample = sample_after(
        calls,
        [bash(timeout=60), python(timeout=60)],
        tmp_path,
        files={"notes/a.txt": "one\n"},
        setup="#!/bin/sh\necho two > b.txt",
    )
    assert answers_of(sample) == ["one\nx07\n", "two\n three\n\n"]


def test_tools_that_live_in_the_sandbox_work(tmp_path: Path) -> None:
    """bash_session keeps its variables between calls, and text_editor edits a file."""
    calls = [
        ("bash_session", {"action": "type_submit", "input": "word=hello"}),
        ("bash_session", {"action": "type_submit", "input": "echo $word > /opt/x07/word.txt; cat /opt/x07/word.txt"}),
        ("text_editor", {"command": "create", "path": "/opt/x07/poem.txt", "file_text": "red\ngreen\n"}),
        ("text_editor", {"command": "str_replace", "path": "/opt/x07/poem.txt", "old_str": "red", "new_str": "blue"}),
        ("bash", {"command": "cat word.txt poem.txt"}),
    ]
    tools = [bash_session(timeout=300), text_editor(timeout=120), bash(timeout=60)]
    answers = answers_of(sample_after(calls, tools, tmp_path))
    assert "hello" in answers[1]
    assert answers[-1] == "hello\nblue\ngreen\n"


def test_a_timeout_is_told_with_the_output_so_far(tmp_path: Path) -> None:
    """A command that takes too long is an error of the tool, and the sandbox stays."""
    calls = [("bash", {"command": "echo started; sleep 60"}), ("bash", {"command": "echo still here"})]
    sample = sample_after(calls, [bash(timeout=2)], tmp_path)
    first, second = (message for message in sample.messages if isinstance(message, ChatMessageTool))
    assert first.error is not None
    assert first.error.type == "timeout"
    assert second.text == "still here\n"


def test_a_sample_may_set_its_policy(tmp_path: Path) -> None:
    """A configuration of a sample replaces that of the task."""
    spec = SandboxEnvironmentSpec("x07", X07Config(memory="300M", env={"GREETING": "hello"}))
    calls = [("bash", {"command": "echo $GREETING; cat /sys/fs/cgroup/memory.max"})]
    assert answers_of(sample_after(calls, [bash(timeout=60)], tmp_path, sandbox=spec)) == [f"hello\n{300 << 20}\n"]


def test_a_policy_may_be_named_by_its_file(tmp_path: Path) -> None:
    """The short form of a configuration is the path of a policy."""
    policy = EXAMPLES / "policies" / "agent.json"
    calls = [("bash", {"command": "cat /sys/fs/cgroup/memory.max"})]
    [answer] = answers_of(sample_after(calls, [bash(timeout=60)], tmp_path, sandbox=("x07", str(policy))))
    assert int(answer) == json.loads(policy.read_bytes())["limits"]["mem_bytes"]


def test_no_more_sandboxes_are_opened_than_the_host_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inspect opens as many sandboxes at once as X07_VM_MAX_SANDBOXES says."""
    monkeypatch.setenv("X07_VM_MAX_SANDBOXES", "3")
    assert X07SandboxEnvironment.default_concurrency() == 3


def test_a_configuration_survives_a_log() -> None:
    """A configuration that was written to a log is read again, and an unknown key is an error."""
    config = X07Config(policy="policy.json", allow_hosts=("pypi.org:443",))
    assert X07SandboxEnvironment.config_deserialize(config.model_dump(mode="json")) == config
    with pytest.raises(ValueError, match="dockerfile"):
        X07SandboxEnvironment.config_deserialize({"dockerfile": "Dockerfile"})


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_commands_run_as_root_only_if_the_configuration_says_so() -> None:
    """Inspect learns by an error of its own that the user root is not there."""
    for guest_root in (False, True):
        config = X07Config(guest_root=guest_root)
        environments = await X07SandboxEnvironment.sample_init("root", config, {})
        sandbox = environments["default"]
        try:
            if guest_root:
                assert (await sandbox.exec(["id", "-u"], user="root")).stdout == "0\n"
                continue
            with pytest.raises(SandboxUserUnsupportedError):
                await sandbox.exec(["id", "-u"], user="root")
            assert (await sandbox.exec(["id", "-un"])).stdout == "x07\n"
            with pytest.raises(PermissionError, match="/etc/new"):
                await sandbox.write_file("/etc/new", "")
        finally:
            await X07SandboxEnvironment.sample_cleanup("root", config, environments, interrupted=False)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_sandbox_that_ended_is_unavailable() -> None:
    """Inspect is told by an error of its own that a sandbox reached the end of its life."""
    from inspect_ai.util import SandboxUnavailableError

    environments = await X07SandboxEnvironment.sample_init("life", X07Config(lifetime_s=2), {})
    sandbox = environments["default"]
    try:
        with pytest.raises(SandboxUnavailableError):
            await sandbox.exec(["sleep", "60"])
        with pytest.raises(SandboxUnavailableError):
            await sandbox.read_file("any")
    finally:
        await X07SandboxEnvironment.sample_cleanup("life", None, environments, interrupted=True)


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The example evaluates one sample with a scripted model."""
    assert load("inspect_eval").main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('bash: {"id": 1,')
    assert lines[1:] == ["python: 118.5", "accuracy: 1.0"]
