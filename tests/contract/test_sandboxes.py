"""Sandboxes from Python on the backends that start no VM."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from tests.conftest import need
from x07_sandbox import Sandbox, SandboxError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.root


@pytest.fixture(params=["podman", "containerd", "os", "none"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, state: Path) -> str:
    """A backend that is not a VM, with the consent to use it. state: the test's own folder."""
    monkeypatch.setenv("X07_I_ACCEPT_WEAKER_ISOLATION", "1")
    name: str = request.param
    if name in {"podman", "containerd"}:
        for variable, value in request.getfixturevalue(name).env.items():
            monkeypatch.setenv(variable, value)
    assert not state.exists()
    return name


@pytest.fixture
def opened(backend: str) -> Iterator[Sandbox]:
    """An open sandbox."""
    try:
        sandbox = Sandbox(backend=backend)
    except SandboxError as exc:
        need(condition=False, reason=f"{exc.what}: {exc.why}", installable="missing" in exc.why)
        raise
    with sandbox:
        yield sandbox


def test_commands_files_and_processes_work_on_each_backend(opened: Sandbox) -> None:
    """Commands, their timeouts, live processes and files behave as in a VM."""
    ended = opened.exec(["sh", "-c", "cat; echo err >&2; exit 3"], input=b"in", env={"A": "1"})
    assert (ended.outcome, ended.exit_code, ended.stdout, ended.stderr) == ("failed", 3, b"in", b"err\n")
    slow = opened.exec(["sh", "-c", "echo begun; sleep 600"], timeout_s=1)
    assert (slow.outcome, slow.stdout) == ("timeout", b"begun\n")
    process = opened.start(["sh", "-c", "trap 'exit 5' TERM; echo ready; while :; do sleep 0.1; done"])
    assert process.read(timeout_s=60) == b"ready\n"
    process.signal(signal.SIGTERM)
    assert process.wait(60).exit_code == 5
    opened.files.write("new/file", b"content", mode=0o600)
    assert (opened.files.read("new/file"), opened.files.stat("new/file").mode) == (b"content", 0o600)
    assert opened.exec(["cat", "new/file"]).stdout == b"content"
    with pytest.raises(FileNotFoundError):
        opened.files.read("missing")


def test_files_are_those_of_the_sandbox(backend: str, opened: Sandbox, tmp_path: Path) -> None:
    """A relative path never leads to the folder of that name on the host."""
    opened.files.write("made-by-test", b"1")
    where = opened.shell("pwd").stdout.decode().strip()
    assert (backend == "none") == os.path.exists(f"{where}/made-by-test")  # noqa: PTH110 - text
    assert not os.path.exists("/opt/x07/made-by-test")  # noqa: PTH110
    opened.download("made-by-test", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"1"


def test_a_terminal_has_the_kind_of_its_client(backend: str, opened: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command with a terminal gets TERM of its client, unless the sandbox or the call sets it; others get none."""
    monkeypatch.setenv("TERM", "tmux-256color")
    words = ["sh", "-c", "echo kind=$TERM"]
    assert opened.start(words, tty=True).wait(60).stdout == b"kind=tmux-256color\r\n"
    assert opened.start(words, tty=True, env={"TERM": "vt100"}).wait(60).stdout == b"kind=vt100\r\n"
    assert opened.exec(words).stdout == b"kind=\n"
    with Sandbox(backend=backend, env={"TERM": "linux"}) as other:
        assert other.start(words, tty=True).wait(60).stdout == b"kind=linux\r\n"
