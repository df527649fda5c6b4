"""Both backends without a virtual machine: what the contract of backends does not say."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.process.conftest import run_on, started
from tests.process.conversation import Conversation, Program, python
from x07_sandbox.channel.link import Stream
from x07_sandbox.channel.messages import Left
from x07_sandbox.errors import HostError

if TYPE_CHECKING:
    from tests.process.conftest import Backend

pytestmark = pytest.mark.user

GONE_S = 10.0


def test_input_may_arrive_before_the_files(backend: Backend) -> None:
    """Input that arrives, with its end, before the program's files is kept for the program."""
    source = "import sys; print(sys.stdin.read())"
    ended = run_on(backend, python(source, stdin=b"early", input_first=True))
    assert (ended.code, ended.stdout) == (0, "early\n"), ended.stderr


def test_an_executable_runs(backend: Backend) -> None:
    """A file with an interpreter line is executed directly."""
    files = {"/x07/in/artifact": (0o555, "file", b'#!/bin/sh\necho "$0" "$1"; pwd; exit 3\n')}
    ended = run_on(backend, Program(argv=["/x07/in/artifact", "/x07/in/word"], files=files))
    assert ended.code == 3, ended.stderr
    first, here = ended.stdout.splitlines()
    program, word = first.split()
    assert program.endswith("/in/artifact")
    assert word.endswith("/in/word")
    assert here.endswith(("/opt/x07", "/work"))


def test_other_signals_leave_a_program_running(backend: Backend) -> None:
    """Signals that are ignored by default, and a terminal's stop signals, neither end nor stop a program."""
    numbers = [signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH]
    numbers += [signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU]
    source = f"import os\nfor number in {[*map(int, numbers)]}: os.kill(os.getpid(), number)\nprint('alive')\n"
    ended = run_on(backend, python(source))
    assert (ended.code, ended.stdout) == (0, "alive\n"), ended.stderr


def test_outputs_held_in_sockets_do_not_delay_the_end(backend: Backend) -> None:
    """A program whose outputs are held open in socket messages that nobody receives ends with its own status."""
    source = """
import os, socket, sys
ours, theirs = socket.socketpair()
socket.send_fds(theirs, [b"x"], [ours.fileno(), theirs.fileno(), 1, 2])
print("sent", flush=True)
os._exit(7)
"""
    ended = run_on(backend, python(source))
    assert (ended.code, ended.stdout) == (7, "sent\n"), ended.stderr


def test_a_command_is_looked_up_on_the_programs_path(backend: Backend) -> None:
    """A name without a slash is looked up on PATH, and an unknown one is reported as missing."""
    ended = run_on(backend, Program(argv=["sh", "-c", "echo $0 $1", "a", "b"]))
    assert (ended.code, ended.stdout) == (0, "a b\n"), ended.stderr
    ended = run_on(backend, Program(argv=["no-such-command"]))
    assert (ended.failed.stage, ended.failed.errno) == ("exec", 2)


def test_files_in_private_folders_are_counted_and_handed_over(backend: Backend) -> None:
    """All files left in the working folder are counted; those that are wanted and readable are sent."""
    source = "import os; open('a', 'w').write('one'); os.mkdir('d'); open('d/b', 'w').close(); open('.rc', 'w').close()"
    ended = run_on(backend, python(source, left=Left(0, 0)))
    assert (ended.code, ended.left.left_files, ended.left.left_bytes) == (0, 2, 3), ended.stderr
    assert Stream.LEFT not in ended.output
    ended = run_on(backend, python(f"{source}; os.chmod('d', 0)", left=Left(9, 9)))
    assert ended.code == 0, ended.stderr
    assert b"one" in ended.output[Stream.LEFT]
    ended = run_on(backend, python("pass", left=Left(9, 9)))
    assert (ended.code, ended.left.left_files) == (0, 0)


def test_a_stopped_program_is_killed_and_reported_as_stopped(backend: Backend) -> None:
    """A stopped program (SIGSTOP) is killed on request, and the agent reports that it was stopped."""

    def stop(conversation: Conversation) -> None:
        time.sleep(0.2)  # until it is stopped: no event from there
        conversation.stop()

    source = "import os, signal; print('here', flush=True); os.kill(os.getpid(), signal.SIGSTOP)"
    ended = run_on(backend, python(source), on_output=stop)
    assert ended.code == -signal.SIGKILL
    assert ended.exited.stopped


def test_the_deadline_holds_when_the_runner_hangs(backend: Backend) -> None:
    """A job whose runner hangs is killed at its deadline."""
    with started(backend, deadline_s=1) as instance:
        assert instance.child.wait(GONE_S) == -signal.SIGALRM


def test_a_job_that_never_started_leaves_no_record(
    backend: Backend, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the agent cannot be prepared, the job's folder is removed."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", "/proc/nowhere")
    with pytest.raises(HostError, match="nowhere"), started(backend):
        pass
    assert not [path for path in state.iterdir() if path.is_dir()]


def test_inaccessible_folders_are_removed(backend: Backend) -> None:
    """Folders that a program made inaccessible are removed too."""
    ended = run_on(backend, python("import os; os.makedirs('a/b/c'); os.chmod('a/b', 0); os.chmod('a', 0)"))
    assert ended.code == 0, ended.stderr
