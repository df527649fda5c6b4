"""Promises of both backends without a virtual machine: a whole conversation, and nothing left of it."""

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
from x07_sandbox.channel.frames import Kind, Stream
from x07_sandbox.channel.link import State
from x07_sandbox.errors import HostError
from x07_sandbox.host.cancel import Caller, Cancel

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


def test_input_output_and_exit_code_are_carried(either: Backend) -> None:
    """A program reads its input, writes to both outputs, and its exit code is reported."""
    source = "import sys; sys.stdout.write(sys.stdin.read().upper()); sys.stderr.write('wrong'); sys.exit(7)"
    ended = run_on(either, python(source, stdin=b"word " * 100_000))
    assert (ended.code, ended.stdout, ended.stderr) == (7, "WORD " * 100_000, "wrong")


def test_an_executable_runs(either: Backend) -> None:
    """A file with a line that names its interpreter is executed as it is."""
    files = {"/x07/in/artifact": (0o555, "file", b'#!/bin/sh\necho "$0" "$1"; pwd; exit 3\n')}
    ended = run_on(either, Program(argv=["/x07/in/artifact", "/x07/in/word"], files=files))
    assert ended.code == 3, ended.stderr
    first, here = ended.stdout.splitlines()
    program, word = first.split()
    assert program.endswith("/in/artifact")
    assert word.endswith("/in/word")
    assert here.endswith(("/opt/x07", "/work"))


def test_a_signal_is_reported(either: Backend) -> None:
    """A program that a signal ends is reported as that."""
    assert run_on(either, python("import os; os.abort()")).code == -signal.SIGABRT


def test_what_cannot_be_executed_is_said(either: Backend) -> None:
    """A program that does not exist fails with the kernel's reason."""
    ended = run_on(either, Program(argv=["/x07/in/nothing"]))
    assert ended.kind is Kind.FAILED
    assert (ended.body["stage"], ended.body["errno"]) == ("exec", 2)


def test_a_command_is_looked_up_on_the_programs_path(either: Backend) -> None:
    """A name without a slash is a program of PATH, and one that is nowhere there is told as missing."""
    ended = run_on(either, Program(argv=["sh", "-c", "echo $0 $1", "a", "b"]))
    assert (ended.code, ended.stdout) == (0, "a b\n"), ended.stderr
    ended = run_on(either, Program(argv=["no-such-command"]))
    assert (ended.kind, ended.body["stage"], ended.body["errno"]) == (Kind.FAILED, "exec", 2)


def test_files_in_private_folders_are_counted_and_handed_over(either: Backend) -> None:
    """Of what is left in the working folder all is counted, and what is wanted and may be read is sent."""
    source = "import os; open('a', 'w').write('one'); os.mkdir('d'); open('d/b', 'w').close(); open('.rc', 'w').close()"
    ended = run_on(either, python(source, left={"files": 0, "bytes": 0}))
    assert (ended.code, ended.body["left_files"], ended.body["left_bytes"]) == (0, 2, 3), ended.stderr
    assert Stream.LEFT_FILES not in ended.streams
    ended = run_on(either, python(f"{source}; os.chmod('d', 0)", left={"files": 9, "bytes": 9}))
    assert ended.code == 0, ended.stderr
    assert b"one" in ended.streams[Stream.LEFT_FILES]
    ended = run_on(either, python("pass", left={"files": 9, "bytes": 9}))
    assert (ended.code, ended.body["left_files"]) == (0, 0)


def test_what_the_program_leaves_running_is_ended(either: Backend) -> None:
    """When the program has ended, so have all processes that it started."""
    source = (
        "import os, sys, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        os.close(1); os.close(2); time.sleep(1000)\n"
        "    os._exit(0)\n"
        "os.wait(); sys.exit(5)\n"
    )
    begun = time.monotonic()
    assert run_on(either, python(source)).code == 5
    assert time.monotonic() - begun < GONE_S


def test_a_stopped_program_is_ended_and_said_to_have_stood_still(either: Backend) -> None:
    """A program that stands still by a signal is ended on request, and the agent says that it stood."""

    def stop(conversation: Conversation) -> None:
        time.sleep(0.2)  # until it stands: only the kernel, there, knows when
        conversation.stop()

    source = "import os, signal; print('here', flush=True); os.kill(os.getpid(), signal.SIGSTOP)"
    ended = run_on(either, python(source), on_output=stop)
    assert ended.code == -signal.SIGKILL
    assert ended.body["stopped"]


def test_a_started_agent_ends_with_its_context(either: Backend) -> None:
    """A caller that leaves before it has sent a program leaves no process behind."""
    with started(either) as instance:
        assert instance.exit_status() is None
    assert instance.exit_status() is not None


def test_the_deadline_holds_without_a_runner_that_looks(either: Backend) -> None:
    """A job whose runner does nothing any more is ended at its deadline."""
    with started(either, deadline_s=1) as instance:
        assert instance.child.wait(GONE_S) == -signal.SIGALRM


def test_a_killed_runner_leaves_no_process(either: Backend, state: Path, cache: Path) -> None:
    """When the runner is killed, agent, program and all its children end too."""
    env = {**os.environ, "X07_VM_STATE_DIR": str(state), "X07_VM_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-c", RUNNER, either.name]
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
    either: Backend, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the agent cannot be prepared, the job's folder goes too."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", "/proc/nowhere")
    with pytest.raises(HostError, match="nowhere"), started(either):
        pass
    assert not [path for path in state.iterdir() if path.is_dir()]


def test_a_job_is_greeted_when_it_starts(either: Backend) -> None:
    """A started job's agent has answered, and its processes are in its record."""
    kind = MachineKind(image=None, ram_bytes=0)
    cancel = Cancel()
    job = Job(claim=claim(), kind=kind, caller=Caller(cancel=cancel))
    with contextlib.closing(cancel), either.start(job) as instance:
        assert instance.greeting.connection.link.state is State.READY
        assert [record.mark for record in either.list_owned()] == [instance.record.mark]
    assert not list(either.list_owned())


def test_a_job_can_be_stopped_by_its_record(either: Backend) -> None:
    """Any process of the user can stop a job by its record; nothing is left of it."""
    with started(either) as instance:
        assert either.stop(instance.record)
        assert not left(instance.record.mark)
        assert not list(either.list_owned())


def test_folders_that_a_program_has_closed_go_too(either: Backend) -> None:
    """A program that takes all rights from its folders leaves nothing behind either."""
    ended = run_on(either, python("import os; os.makedirs('a/b/c'); os.chmod('a/b', 0); os.chmod('a', 0)"))
    assert ended.code == 0, ended.stderr
