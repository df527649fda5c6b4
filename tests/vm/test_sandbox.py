"""Sandboxes in VMs: the image's commands, denials by the VM's kernel, a warm or lost VM, and one that is held."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

from tests.vm.conftest import left_behind, marked, owners, usual_start
from x07_sandbox import Ended, Pool, Sandbox, SandboxError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("image", "state")]


@pytest.fixture(scope="module")
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """An open sandbox with a policy, which no test closes."""
    request.getfixturevalue("image")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("X07_VM_STATE_DIR", str(tmp_path_factory.mktemp("shared") / "state"))
        with Sandbox(policy="built-in:default", fds=20) as opened:
            yield opened


def text(ended: Ended) -> str:
    """The standard output of a command that succeeded."""
    assert ended.ok, (ended.reason, ended.stderr)
    return ended.stdout.decode()


def test_a_missing_command_is_a_result(shared: Sandbox) -> None:
    """A command that does not exist ends with status 127 and advice."""
    ended = shared.exec(["no-such-command"])
    assert (ended.outcome, ended.exit_code) == ("failed", 127)
    assert "the command no-such-command is not in the image" in ended.reason


def test_the_image_has_what_programs_expect(shared: Sandbox) -> None:
    """Programs can create and execute files in /var/tmp, and the image knows the kind of a command's terminal."""
    words = ["sh", "-c", "printf '#!/bin/sh\\necho ran\\n' > /var/tmp/new; chmod +x /var/tmp/new; /var/tmp/new"]
    assert text(shared.exec(words)) == "ran\n"
    known = ["python3", "-c", "import curses; curses.setupterm(); print(1)"]
    for kind in ("xterm-256color", "tmux-256color"):
        assert shared.start(known, tty=True, env={"TERM": kind}).wait(60).stdout == b"1\r\n"


def test_policies_bound_each_command(shared: Sandbox) -> None:
    """A given policy's limits hold for each command; what it denies is reported with the command."""
    ended = shared.exec(["sh", "-c", "echo > /usr/new"])
    assert [(one.field, one.subject) for one in ended.denials] == [("permissions", "/usr/")]
    assert shared.exec(["true"]).denials == ()
    assert text(shared.exec(["sh", "-c", "ulimit -n"])) == "20\n"


def test_a_command_without_a_network_says_what_it_tried(shared: Sandbox) -> None:
    """A command whose connections fail for want of a network names at most 64 of them, with the flag that helps."""
    script = """
import socket
for host in ("192.0.2.7", socket.gethostname(), "db", "pypi.org", *(f"h{n}.example" for n in range(100))):
    try:
        socket.create_connection((host, 80))
    except OSError as exc:
        print(exc)
"""
    ended = shared.exec(["python3", "-c", script])
    lines = text(ended).splitlines()
    assert lines == ["[Errno 101] Network is unreachable"] + 103 * ["[Errno -3] Temporary failure in name resolution"]
    named = [(one.action, one.subject) for one in ended.denials]
    assert {("look up", "db"), ("look up", "pypi.org")} < {*named}
    assert ("look up", "x07") not in named
    flags = [one.how_to_allow.flag for one in ended.denials if one.how_to_allow and one.subject == "pypi.org"]
    assert flags == ["--allow-host pypi.org:443"]
    assert len(ended.denials) == 64
    assert shared.exec(["true"]).denials == ()


def test_a_refused_request_about_files_is_no_denial_of_a_command(shared: Sandbox) -> None:
    """A refused write by the caller is an error of that call, and the next command does not report it."""
    with pytest.raises(OSError, match="Read-only"):
        shared.files.write("/etc/passwd", b"")
    assert shared.exec(["true"]).denials == ()


def test_a_command_starts_although_programs_have_killed_what_waited_for_it(shared: Sandbox) -> None:
    """The process that waits for the next command may be killed by a program; the command then gets another one."""
    assert shared.shell("(sleep 1; kill -9 -1) > /dev/null 2>&1 &").ok
    time.sleep(2)
    for word in ("one", "two"):
        assert text(shared.exec(["echo", word])) == f"{word}\n"


def test_a_pool_hands_out_sandboxes(state: Path) -> None:
    """A sandbox of a pool starts in a waiting VM, and may outlive the pool."""
    with Pool(size=1) as pool:
        assert pool.wait_ready(120)
        opened = pool.sandbox()
        assert text(opened.exec(["echo", "one"])) == "one\n"
    assert text(opened.exec(["echo", "two"])) == "two\n"
    result = opened.close()
    assert (result.phases["run"].start, len(result.commands)) == ("pool", 2)
    assert left_behind(state) == []


def test_a_held_vm_is_lost_apart_from_a_failure(tmp_path: Path, state: Path) -> None:
    """If the VM of a held sandbox is killed, a waiting client gets an error, and the result says what happened."""
    (tmp_path / "work").mkdir()
    opened = Sandbox.create(workdir=tmp_path / "work")
    opened.shell("echo 1 > new.txt", check=True)
    process = opened.start(["sh", "-c", "echo begun; sleep 600"])
    assert process.read(timeout_s=60) == b"begun\n"
    (owner,) = owners(state)
    os.kill(owner["processes"]["supervisor"]["pid"], signal.SIGKILL)  # type: ignore[index]
    with pytest.raises(SandboxError) as raised:
        process.wait(60)
    assert raised.value.code == "sandbox-lost"
    result = opened.close()
    assert (result.outcome, result.phases["run"].start) == ("guest-lost", usual_start())
    assert list((tmp_path / "work").iterdir()) == []
    deadline = time.monotonic() + 60
    while marked(str(owner["instance"])) or left_behind(state):
        assert time.monotonic() < deadline
        time.sleep(0.05)  # the process that holds the sandbox ends after it
