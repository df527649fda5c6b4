"""Both backends without a virtual machine: a whole conversation, and no remains."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.process.conftest import claim, left, run_on, started
from tests.process.conversation import Conversation, Program, python
from x07_sandbox.backends.base import Job, MachineKind
from x07_sandbox.channel.link import State, Stream
from x07_sandbox.channel.messages import Left
from x07_sandbox.errors import HostError
from x07_sandbox.host.waiting import Caller, Cancel
from x07_sandbox.records.stopping import live_records

if TYPE_CHECKING:
    from tests.process.conftest import Backend

pytestmark = pytest.mark.user

ROOT = Path(__file__).parents[2]
GONE_S = 10.0
# A runner that is killed while its program runs.
RUNNER = """
import sys
from tests.process.conftest import started
from tests.process.conversation import Conversation, python
from x07_sandbox.backends.registry import create

with started(create(sys.argv[1])) as instance:
    print(instance.record.mark, flush=True)
    source = "import os, signal; os.fork() or os.setsid(); print('here', flush=True); signal.pause()"
    Conversation(instance).run(python(source), on_output=lambda _it: print("runs", flush=True))
"""


def test_input_output_and_exit_code_are_carried(backend: Backend) -> None:
    """A program reads its input and writes to both outputs, and its exit code is reported."""
    source = "import sys; sys.stdout.write(sys.stdin.read().upper()); sys.stderr.write('wrong'); sys.exit(7)"
    ended = run_on(backend, python(source, stdin=b"word " * 100_000))
    assert (ended.code, ended.stdout, ended.stderr) == (7, "WORD " * 100_000, "wrong")


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


def test_a_signal_is_reported(backend: Backend) -> None:
    """A program killed by a signal is reported with that signal."""
    assert run_on(backend, python("import os; os.abort()")).code == -signal.SIGABRT


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


def test_a_missing_program_fails_with_the_reason(backend: Backend) -> None:
    """A program that does not exist fails with the kernel's reason."""
    ended = run_on(backend, Program(argv=["/x07/in/nothing"]))
    assert (ended.failed.stage, ended.failed.errno) == ("exec", 2)


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


def test_processes_left_by_a_program_are_killed(backend: Backend) -> None:
    """When a program ends, all processes that it started are killed."""
    source = (
        "import os, sys, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        os.close(1); os.close(2); time.sleep(1000)\n"
        "    os._exit(0)\n"
        "os.wait(); sys.exit(5)\n"
    )
    started_at = time.monotonic()
    assert run_on(backend, python(source)).code == 5
    assert time.monotonic() - started_at < GONE_S


def test_a_stopped_program_is_killed_and_reported_as_stopped(backend: Backend) -> None:
    """A stopped program (SIGSTOP) is killed on request, and the agent reports that it was stopped."""

    def stop(conversation: Conversation) -> None:
        time.sleep(0.2)  # until it is stopped: no event from there
        conversation.stop()

    source = "import os, signal; print('here', flush=True); os.kill(os.getpid(), signal.SIGSTOP)"
    ended = run_on(backend, python(source), on_output=stop)
    assert ended.code == -signal.SIGKILL
    assert ended.exited.stopped


def test_a_started_agent_ends_with_its_context(backend: Backend) -> None:
    """A caller that leaves before it has sent a program leaves no process behind."""
    with started(backend) as instance:
        assert instance.exit_status() is None
    assert instance.exit_status() is not None


def test_the_deadline_holds_when_the_runner_hangs(backend: Backend) -> None:
    """A job whose runner hangs is killed at its deadline."""
    with started(backend, deadline_s=1) as instance:
        assert instance.child.wait(GONE_S) == -signal.SIGALRM


def test_a_killed_runner_leaves_no_process(backend: Backend, state: Path, cache: Path) -> None:
    """A killed runner leaves no agent, program or child process behind."""
    env = {**os.environ, "X07_VM_STATE_DIR": str(state), "X07_VM_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-c", RUNNER, backend.name]
    with subprocess.Popen(argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as runner:
        assert runner.stdout is not None
        mark = runner.stdout.readline().strip()
        assert runner.stdout.readline() == "runs\n"
        assert left(mark)
        runner.kill()
    deadline = time.monotonic() + GONE_S
    while left(mark) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left(mark)


def test_a_job_that_never_started_leaves_no_record(
    backend: Backend, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the agent cannot be prepared, the job's folder is removed."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", "/proc/nowhere")
    with pytest.raises(HostError, match="nowhere"), started(backend):
        pass
    assert not [path for path in state.iterdir() if path.is_dir()]


def test_a_started_job_has_completed_the_handshake(backend: Backend) -> None:
    """When a job has started, its agent has completed the handshake, and its processes are in its record."""
    kind = MachineKind(image=None, ram_bytes=0)
    cancel = Cancel()
    job = Job(claim=claim(), kind=kind, caller=Caller(cancel=cancel))
    with contextlib.closing(cancel), backend.start(job) as instance:
        assert instance.greeting.connection.link.state is State.READY
        assert [record.mark for record in live_records(backend.name)] == [instance.record.mark]
    assert not live_records(backend.name)


def test_a_job_can_be_stopped_by_its_record(backend: Backend) -> None:
    """Any process of the user can stop a job by its record, and no remains are left."""
    with started(backend) as instance:
        assert backend.stop(instance.record)
        assert not left(instance.record.mark)
        assert not live_records(backend.name)


def test_inaccessible_folders_are_removed(backend: Backend) -> None:
    """Folders that a program made inaccessible are removed too."""
    ended = run_on(backend, python("import os; os.makedirs('a/b/c'); os.chmod('a/b', 0); os.chmod('a', 0)"))
    assert ended.code == 0, ended.stderr
