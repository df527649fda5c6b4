"""Several commands in one sandbox, on the backends without a virtual machine: what the contract does not say.

The behaviours that every backend has are in src/x07_sandbox/conformance/commands.py.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.guest.messages import FREE
from tests.process.conftest import started
from tests.process.conversation import ENV, LIMITS, Session
from x07_sandbox.channel.files import Answer, Buffer, Request, answer_of, encode
from x07_sandbox.channel.link import Stream
from x07_sandbox.channel.messages import (
    Close,
    Confine,
    Exec,
    Exited,
    Failed,
    InputFile,
    Stop,
)
from x07_sandbox.host.linux import children_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.process.conftest import Backend
    from x07_sandbox.backends.jailed import StreamInstance
    from x07_sandbox.backends.process import NoneBackend, OsBackend


class Sandbox(Session):
    """An open session with several commands."""

    def __init__(self, instance: StreamInstance, files: list[InputFile] | None = None, confine: Confine = FREE) -> None:
        super().__init__(instance)
        self.inputs: dict[int, int] = {}
        self.open(files or [], confine)

    def exec(self, *argv: str, stdin: bytes | None = b"", cwd: str = "/opt/x07", **how: Any) -> int:  # noqa: ANN401
        """Start a command and return its id. stdin: None to keep the input open. how: further fields of EXEC."""
        command = len(self.inputs) + 1
        self.link.send(Exec(command, list(argv), dict(ENV), cwd, LIMITS, **how))
        self.inputs[command] = number = self.link.open(Stream.STDIN, command)
        if stdin is not None:
            assert self.link.streams.send(number, stdin) == len(stdin)
            self.link.streams.finish(number)
        return command

    def sh(self, text: str, **how: Any) -> int:  # noqa: ANN401
        """Start a shell command and return its id."""
        return self.exec("/bin/sh", "-c", text, **how)

    def code(self, command: int) -> int:
        """Wait for a command's end and return its exit code, negative for a signal."""
        self.wait(lambda: command in self.ended)
        ended = self.ended[command]
        assert isinstance(ended, Exited), ended
        return os.waitstatus_to_exitcode(ended.wait_status)

    def failure(self, command: int) -> Failed:
        """Wait for the report that a command was not executed."""
        self.wait(lambda: command in self.ended)
        failed = self.ended[command]
        assert isinstance(failed, Failed), failed
        return failed

    def here(self) -> str:
        """Return the working folder of commands."""
        command = self.sh("pwd")
        assert self.code(command) == 0
        return self.text(command).strip()

    def stop(self, command: int) -> None:
        """Kill a command."""
        self.link.send(Stop(command, signal.SIGKILL))

    def text(self, command: int) -> str:
        """Return the output of a command so far."""
        return self.output[Stream.STDOUT, command].decode()

    def wait_for(self, command: int, text: str) -> None:
        """Wait until a command has written *text*."""
        self.wait(lambda: text in self.text(command))


@pytest.fixture
def sandbox(backend: Backend) -> Iterator[Sandbox]:
    """An open session."""
    with started(backend) as instance:
        yield Sandbox(instance)


def test_a_command_is_stopped_before_its_files_have_arrived(backend: Backend) -> None:
    """A command that waits for the session's files can be stopped, and ends with the session."""
    for close in (False, True):
        with started(backend) as instance:
            sandbox = Sandbox(instance, [InputFile("/x07/in/file", 0o644, "file", 5)])
            command = sandbox.sh("exit 0")
            sandbox.link.send(Close(0, None, None) if close else Stop(command, signal.SIGKILL))
            failed = sandbox.failure(command)
            assert (failed.id, failed.stage, failed.errno) == (command, "exec", 0)


def test_stopping_finds_what_left_the_tree_in_the_same_session(sandbox: Sandbox) -> None:
    """Stopping a command also kills processes whose parents have ended, unless they made a session of their own."""
    fork = "import os, time; print(os.fork() and os._exit(0) or 'up', flush=True); time.sleep(4242)"
    tree = sandbox.exec("/bin/sh", "-c", 'python3 -c "$1"; sleep 1000', "sh", fork)
    sandbox.wait_for(tree, "up")
    sandbox.stop(tree)
    assert sandbox.code(tree) == -9
    count = sandbox.sh("ps -e -o args | grep -c '[s]leep(4242' || true")
    assert (sandbox.code(count), sandbox.text(count)) == (0, "0\n")


def test_a_missing_command_does_not_end_the_session(sandbox: Sandbox) -> None:
    """A command that does not exist fails alone, as the first one and as a later one."""
    for _ in range(2):
        failed = sandbox.failure(sandbox.exec("no-such-command"))
        assert (failed.stage, failed.errno) == ("exec", 2)
        assert sandbox.code(sandbox.sh("exit 4")) == 4


def test_commands_inherit_nothing(sandbox: Sandbox) -> None:
    """The first command and later ones have their standard streams and no other descriptor."""
    for _ in range(2):
        command = sandbox.sh("ls /proc/$$/fd")
        assert (sandbox.code(command), sandbox.text(command).split()) == (0, ["0", "1", "2"])


class Files:
    """Requests to the file server of a sandbox."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.command = sandbox.exec(stdin=None, service="files", cwd="/")
        self.buffer = Buffer()
        self.seen = 0

    def ask(self, kind: str, path: str, content: bytes = b"", **how: Any) -> Answer:  # noqa: ANN401
        """Send a request and return its answer."""
        if content:
            how["size"] = len(content)
        self.sandbox.send(self.sandbox.inputs[self.command], encode(Request(kind, path, **how)) + content)
        values: list[list[object]] = []

        def came() -> bool:
            self._fill()
            if (found := self.buffer.take()) is not None:
                values.append(found)
            return bool(values)

        self.sandbox.wait(came)
        return answer_of(values[0])

    def rest(self, size: int) -> bytes:
        """Return the *size* bytes after an answer."""
        self.sandbox.wait(lambda: self._fill() >= size)
        return self.buffer.piece(size)

    def _fill(self) -> int:
        output = self.sandbox.output[Stream.STDOUT, self.command]
        self.buffer.data += output[self.seen :]
        self.seen = len(output)
        return len(self.buffer.data)


def test_requests_about_folders_fail_with_the_kernels_errors(sandbox: Sandbox) -> None:
    """A request to make, remove, list, unpack or pack the wrong kind of entry fails with the kernel's error."""
    files, here = Files(sandbox), sandbox.here()
    assert sandbox.code(sandbox.sh("mkdir d; : > d/e; : > closed; chmod 0 closed")) == 0
    expected = [
        ("make", f"{here}/d", errno.EEXIST),
        ("remove", f"{here}/d", errno.ENOTEMPTY),
        ("list", f"{here}/closed", errno.ENOTDIR),
        ("put", f"{here}/d", errno.EEXIST),
        ("get", f"{here}/closed", errno.ENOTDIR),
    ]
    for kind, path, number in expected:
        content = b"some bytes" if kind == "put" else b""
        assert files.ask(kind, path, content) == Answer(number), (kind, path)
    assert files.ask("stat", here).errno == 0


def test_no_request_ends_the_file_server(sandbox: Sandbox) -> None:
    """After a request with a bad path, size or answer, the file server answers the next one."""
    files, here = Files(sandbox), sandbox.here()
    names = sandbox.exec("python3", "-c", "for i in range(6000): open(b'%05d' % i + 245 * b'\\xff', 'x').close()")
    assert sandbox.code(names) == 0, sandbox.text(names)
    assert files.ask("stat", f"{here}/\0").errno == errno.EINVAL
    assert files.ask("write", f"{here}/\0", encode(Request("make", "forged"))).errno == errno.EINVAL
    assert files.ask("put", f"{here}/\0", b"no tree").errno == errno.EINVAL
    assert files.ask("list", here).errno == errno.E2BIG
    assert files.ask("write", f"{here}/a", b"abc") == Answer(0)
    assert files.ask("read", f"{here}/a", offset=1, size=2**62) == Answer(0, 2)
    assert files.rest(2) == b"bc"
    assert files.ask("read", f"{here}/a", offset=2**62, size=1) == Answer(0)
    assert files.ask("read", f"{here}/a", offset=-1, size=1).errno == errno.EINVAL
    assert files.rest(files.ask("read", "/proc/self/stat", size=9).size) != b""
    assert files.ask("read", "/proc/self/smaps", size=1 << 20).size > 1 << 14  # much more than one read returns


def test_a_link_never_leads_to_the_streams_of_the_file_server(sandbox: Sandbox) -> None:
    """A program's link to a descriptor of the file server can be neither written nor read, and later answers hold."""
    files, here = Files(sandbox), sandbox.here()
    open_now = {int(info.name): info.target for info in files.ask("list", "/proc/self/fd").entries}
    assert all(target.startswith("pipe:") == (number < 3) for number, target in open_now.items()), open_now
    assert sandbox.code(sandbox.sh("for fd in 0 1 2 3; do ln -s /proc/self/fd/$fd link$fd; done")) == 0
    forged = encode(Answer(0, 7)) + b"forged!"
    for name, wanted in (("link0", errno.EACCES), ("link1", errno.EACCES), ("link2", errno.EACCES)):
        assert files.ask("write", f"{here}/{name}", forged) == Answer(wanted), name
        assert files.ask("read", f"{here}/{name}", size=9) == Answer(wanted), name
    assert files.ask("write", f"{here}/link3", forged).errno in {errno.ENOENT, errno.ENXIO, 0}  # a file of the request
    assert files.ask("stat", "/").entries[0].name == ""
    assert b"forged" not in sandbox.output[Stream.STDOUT, files.command]


def test_a_list_of_programs_applies_to_commands_after_a_service(confined: OsBackend) -> None:
    """A policy's list of programs applies to every command, also if the file server is started first."""
    with started(confined) as instance:
        sandbox = Sandbox(instance, confine=FREE._replace(programs=["/bin/sh", "/usr/bin/cat"]))
        assert Files(sandbox).ask("stat", "/").errno == 0
        assert sandbox.code(sandbox.sh("cat /dev/null")) == 0
        assert sandbox.code(sandbox.sh("exec ls /")) == 126


def test_a_command_can_be_detached(sandbox: Sandbox) -> None:
    """The input of a detached command is at its end, and its output is sent as that of others."""
    command = sandbox.sh("read line && exit 1; echo out; echo err >&2", detached=True)
    assert sandbox.code(command) == 0
    assert sandbox.output == {(Stream.STDOUT, command): b"out\n", (Stream.STDERR, command): b"err\n"}


def test_the_end_of_an_unused_process_ends_nothing(unconfined: NoneBackend) -> None:
    """If the first command does not take the process that waits, commands survive the end of that process."""
    with started(unconfined) as instance:
        sandbox = Sandbox(instance)
        files = Files(sandbox)
        assert files.ask("stat", "/").errno == 0
        agent = instance.inner.pid
        (init,) = children_of(agent)
        waiting = children_of(init)[0]
        os.kill(waiting, signal.SIGKILL)
        while Path(f"/proc/{waiting}").exists():
            time.sleep(0.01)  # another process's child has no event
        assert files.ask("stat", "/").errno == 0
        assert sandbox.code(sandbox.sh("exit 3")) == 3
