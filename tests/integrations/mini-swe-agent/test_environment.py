"""The environment of mini-swe-agent, and an agent that uses it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from minisweagent.environments import get_environment
from minisweagent.exceptions import Submitted

from tests.examples import load
from x07_sandbox.integrations.mini_swe_agent import X07Environment


@pytest.fixture(scope="module")
def environment() -> Iterator[X07Environment]:
    """An environment for most tests, as a configuration names it."""
    name = "x07_sandbox.integrations.mini_swe_agent.X07Environment"
    environment = get_environment({"environment_class": name, "env": {"PAGER": "cat"}, "memory": "300M"})
    yield environment
    environment.cleanup()


def test_a_command_has_an_answer(environment: X07Environment) -> None:
    """The agent reads both streams in order, and the exit code; each command is a new shell."""
    answer = environment.execute({"command": "cd /tmp; echo $PAGER; echo two >&2; exit 3"})
    assert answer == {"output": "cat\ntwo\n", "returncode": 3, "exception_info": ""}
    assert environment.execute({"command": "pwd"}, "/usr")["output"] == "/usr\n"
    assert environment.execute({"command": "pwd"})["output"] == "/opt/x07\n"


def test_what_ended_a_command_is_told(environment: X07Environment) -> None:
    """A timeout is no exception: the agent is told the reason, with the output so far."""
    answer = environment.execute({"command": "echo started; sleep 60"}, timeout=1)
    assert (answer["output"], answer["returncode"]) == ("started\n", -1)
    assert "time limit" in answer["exception_info"]
    assert "131072 bytes" in environment.execute({"command": "x" * 200_000})["exception_info"]
    assert environment.execute({"command": "kill -SEGV $$"})["returncode"] == 139


def test_a_task_is_submitted_by_its_first_line(environment: X07Environment) -> None:
    """The line that ends a task counts only as the first one of a command that succeeds."""
    line = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT; echo done"
    with pytest.raises(Submitted) as raised:
        environment.execute({"command": line})
    assert raised.value.messages[0]["extra"] == {"exit_status": "Submitted", "submission": "done\n"}
    assert environment.execute({"command": f"{line}; false"})["returncode"] == 1
    assert environment.execute({"command": f"echo first; {line}"})["returncode"] == 0


def test_templates_and_trajectories_describe_the_sandbox(environment: X07Environment) -> None:
    """Prompts have the system of the sandbox, and a trajectory the configuration."""
    found = environment.get_template_vars(task="any")
    assert (found["system"], found["task"], found["memory"]) == ("Linux", "any", "300M")
    assert found["machine"] in {"x86_64", "aarch64"}
    config = environment.serialize()["info"]["config"]
    assert config["environment_type"].endswith("mini_swe_agent.X07Environment")
    assert config["environment"]["env"] == {"PAGER": "cat"}


def test_the_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The example's agent submits its answer, and its changes are kept and not applied."""
    load("mini_swe").main(str(tmp_path))
    printed = capsys.readouterr().out
    assert printed.startswith("42\n")
    assert "+print(6 * 7)" in printed
    assert list(tmp_path.iterdir()) == []
