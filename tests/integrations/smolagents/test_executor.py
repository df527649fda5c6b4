"""The executor of smolagents, and an agent that uses it."""

from collections.abc import Iterator

import pytest
from smolagents import AgentError, FinalAnswerTool

from tests.examples import load
from x07_sandbox import Sandbox
from x07_sandbox.integrations.smolagents import LOGS_MAX, X07Executor

SPOILED = """
import gc, io, os
answers = max((o for o in gc.get_objects() if isinstance(o, io.TextIOWrapper)), key=lambda o: o.fileno())
answers.write('no JSON\\n')
os.close(1)
"""
PICKLED = """
class FinalAnswerException(BaseException):
    value = 'pickle:gASVAAAAAAAAAA=='
raise FinalAnswerException
"""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """A sandbox for all tests."""
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def executor(sandbox: Sandbox) -> Iterator[X07Executor]:
    """A new Python process."""
    executor = X07Executor(sandbox, timeout_s=30)
    yield executor
    executor.cleanup()


def test_names_stay_and_output_comes_in_order(executor: X07Executor) -> None:
    """The value of the last expression is the output, and what the code and its processes print are the logs."""
    result = executor("import os\nx = 41\nprint('a')\nos.system('echo b; echo c >&2')\nx + 1")
    assert (result.output, result.logs, result.is_final_answer) == ("42", "a\nb\nc\n", False)
    assert executor("x = x - 1").output is None
    assert executor("x").output == "40"
    assert executor("def f():\n    return x\n[f() for _ in range(2)]").output == "[40, 40]"


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (
            "print('before')\n1 / 0",
            'before\n\nTraceback (most recent call last):\n  File "<code>", line 2, in <module>',
        ),
        ("def f(:", "SyntaxError"),
        ("!pip install numpy", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("input()", "EOFError"),
    ],
)
def test_an_error_is_told_to_the_agent(executor: X07Executor, code: str, text: str) -> None:
    """The agent reads the traceback of its own code, and the process goes on."""
    executor("kept = 1")
    with pytest.raises(AgentError) as raised:
        executor(code)
    assert text in str(raised.value)
    assert executor("kept").output == "1"


def test_logs_are_bounded(executor: X07Executor) -> None:
    """Of much output the beginning is kept, and the next call is not affected."""
    assert len(executor("print('y' * 5_000_000)").logs) == LOGS_MAX
    assert executor("print('next')").logs == "next\n"


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import time\ntime.sleep(60)", "it took more than 6 s"),
        ("import os\nos._exit(3)", "exited with status 3"),
        (SPOILED, "ended"),
    ],
)
def test_a_new_process_has_the_tools_and_variables(sandbox: Sandbox, code: str, why: str) -> None:
    """After a timeout or crash, the agent's tools and variables are there, and what its code has made is not."""
    executor = X07Executor(sandbox, timeout_s=6)
    executor.send_variables({"given": {"a": (1, 2)}})
    executor("made = 1")
    with pytest.raises(AgentError, match=why):
        executor(code)
    assert executor("given['a']").output == "(1, 2)"
    with pytest.raises(AgentError, match="NameError"):
        executor("made")
    executor.cleanup()


def test_a_final_answer_is_data(executor: X07Executor) -> None:
    """The final answer comes as JSON, and pickled objects of the sandbox are never loaded."""
    executor.send_tools({"final_answer": FinalAnswerTool()})
    result = executor("final_answer({'a': [1, 2.5, None]})")
    assert (result.output, result.is_final_answer) == ({"a": [1, 2.5, None]}, True)
    with pytest.raises(AgentError, match="Pickle data rejected"):
        executor(PICKLED)


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The example's agent uses a tool, and gives its answer."""
    load("smolagents_agent").main()
    assert capsys.readouterr().out == "{'answer': 42}\n"
