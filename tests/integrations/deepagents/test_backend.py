"""How the backend answers where the standard tests leave a choice, and an agent that uses it."""

from collections.abc import Iterator

import pytest

from tests.examples import load
from x07_sandbox import Sandbox
from x07_sandbox.integrations.deepagents import X07Backend


@pytest.fixture(scope="module")
def backend() -> Iterator[X07Backend]:
    """A backend for all tests."""
    with Sandbox() as sandbox:
        yield X07Backend(sandbox)


def test_output_and_errors_come_in_order(backend: X07Backend) -> None:
    """The agent reads both streams as a terminal would show them, and the exit code."""
    answer = backend.execute("echo one; echo two >&2; echo three; exit 3")
    assert (answer.output, answer.exit_code, answer.truncated) == ("one\ntwo\nthree\n", 3, False)


def test_a_timeout_is_an_answer_with_the_output_so_far(backend: X07Backend) -> None:
    """A command that takes too long ends with code 124 and the reason, and the sandbox stays."""
    answer = backend.execute("echo started; sleep 60", timeout=1)
    assert answer.exit_code == 124
    assert answer.output.startswith("started\nthe program reached its time limit")
    assert backend.execute("echo fine").output == "fine\n"


def test_a_command_that_is_too_long_is_an_answer(backend: X07Backend) -> None:
    """What the kernel cannot execute is told to the agent."""
    answer = backend.execute("echo " + "x" * 200_000)
    assert answer.exit_code == 126
    assert "131072 bytes" in answer.output


def test_file_errors_have_the_words_of_deepagents(backend: X07Backend) -> None:
    """Each file has its own answer, and the others are written."""
    files = [("/etc/new", b""), ("/tmp", b""), ("new", b""), ("/etc/passwd/new", b""), ("/tmp/new", b"")]  # noqa: S108
    words = [answer.error for answer in backend.upload_files(files)]
    assert words == ["permission_denied", "is_directory", "invalid_path", "invalid_path", None]


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The example's agent writes, edits and runs a program."""
    load("deep_agent").main()
    lines = capsys.readouterr().out.splitlines()
    assert "execute: good morning" in lines
    assert lines[-1] == "The program greets."
