"""Several commands in one sandbox, on the backends without a virtual machine."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.guest.messages import FREE
from tests.process.conftest import started
from tests.process.conversation import ENV, LIMITS, TMP_BYTES
from x07_sandbox.channel import streams
from x07_sandbox.channel.connection import Connection
from x07_sandbox.channel.files import Answer, Buffer, Request, answer_of, encode
from x07_sandbox.channel.link import State, Stream
from x07_sandbox.channel.messages import (
    Close,
    Closed,
    Confine,
    Exec,
    Exited,
    Failed,
    InputFile,
    Open,
    Resize,
    Room,
    Seed,
    Started,
    Stop,
    Terminal,
)
from x07_sandbox.channel.streams import Event, Role
from x07_sandbox.channel.trees import Entry, FileEnd, Hole, Kind, Piece, Reader, segment
from x07_sandbox.host.linux import children_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.process.conftest import Backend
    from x07_sandbox.backends.jailed import StreamInstance
    from x07_sandbox.backends.process import NoneBackend, OsBackend

pytestmark = pytest.mark.timeout(120)
MOST_S = 30.0


class Sandbox:
    """The host's side of a session with several commands."""

    def __init__(self, instance: StreamInstance, files: list[InputFile] | None = None, confine: Confine = FREE) -> None:
        self.instance = instance
        self.connection = Connection(instance.channel_fd, Role.HOST)
        self.link = self.connection.link
        self.output: dict[tuple[Stream, int], bytes] = {}
        self.inputs: dict[int, int] = {}
        self.started: set[int] = set()
        self.ended: dict[int, Exited | Failed] = {}
        self.closed: Closed | None = None
        self.last = 0
        self.wait(lambda: self.link.state is not State.WAITING)
        self.link.send(Seed(1, bytes(64), bytes(16), bytes(15) + b"\1"))
        self.wait(lambda: self.link.state is State.READY)
        room = Room(1 << 20, 1 << 20)
        self.link.send(
            Open(
                "x07",
                LIMITS.mem_bytes,
                LIMITS.tasks,
                TMP_BYTES,
                files or [],
                [],
                confine,
                None,
                out_writable=False,
                room=room,
            )
        )

    def exec(self, *argv: str, stdin: bytes | None = b"", cpu_ms: int = LIMITS.cpu_ms, **how: Any) -> int:  # noqa: ANN401
        """Start a command and return its id. stdin: None to keep the input open. how: further fields of EXEC."""
        self.last += 1
        limits = LIMITS._replace(cpu_ms=cpu_ms)
        self.link.send(Exec(self.last, list(argv), dict(ENV), "/opt/x07", limits, **how))
        self.inputs[self.last] = number = self.link.open(Stream.STDIN, self.last)
        if stdin is not None:
            assert self.link.streams.send(number, stdin) == len(stdin)
            self.link.streams.finish(number)
        return self.last

    def sh(self, text: str, **how: Any) -> int:  # noqa: ANN401
        """Start a shell command and return its id."""
        return self.exec("/bin/sh", "-c", text, **how)

    def code(self, command: int) -> int:
        """Wait for a command's end and return its exit code, negative for a signal."""
        self.until_ended(command)
        ended = self.ended[command]
        assert isinstance(ended, Exited), ended
        return os.waitstatus_to_exitcode(ended.wait_status)

    def service(self, service: str, *argv: str) -> int:
        """Start a service, whose input stays open, and return its id."""
        self.last += 1
        self.link.send(Exec(self.last, list(argv), {}, "/", LIMITS, service))
        self.inputs[self.last] = self.link.open(Stream.STDIN, self.last)
        return self.last

    def here(self) -> str:
        """Return the working folder of commands."""
        command = self.sh("pwd")
        assert self.code(command) == 0
        return self.text(command).strip()

    def send(self, inputs: dict[int, bytes]) -> None:
        """Write to commands whose input is open, all at once."""
        left = dict(inputs)

        def more() -> bool:
            for command, data in list(left.items()):
                left[command] = data[self.link.streams.send(self.inputs[command], data) :]
            return not any(left.values())

        self.wait(more)

    def write(self, inputs: dict[int, bytes]) -> None:
        """Write to commands whose input is open, all at once, and end their input."""
        self.send(inputs)
        for command in inputs:
            self.link.streams.finish(self.inputs[command])

    def stop(self, command: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to a command."""
        self.link.send(Stop(command, number))

    def resize(self, command: int, rows: int, columns: int) -> None:
        """Change the size of a command's terminal."""
        self.link.send(Resize(command, rows, columns))

    def until_ended(self, command: int) -> None:
        """Wait until a command has ended."""
        self.wait(lambda: command in self.ended)

    def until_started(self, command: int) -> None:
        """Wait until a command runs."""
        self.wait(lambda: command in self.started)

    def text(self, command: int) -> str:
        """Return the output of a command so far."""
        return self.output.get((Stream.STDOUT, command), b"").decode()

    def wait_for(self, command: int, text: str) -> None:
        """Wait until a command has written *text*."""
        self.wait(lambda: text in self.text(command))

    def close(self) -> Closed:
        """Close the session."""
        self.link.send(Close(0, None, None))
        self.wait(lambda: self.closed is not None)
        assert self.closed is not None
        return self.closed

    def wait(self, done: Callable[[], bool]) -> None:
        """Take what the agent sends until *done* returns True."""
        until = time.monotonic() + MOST_S
        while not done():
            assert self.connection.flush(), self.instance.console_tail()
            poll = select.poll()
            poll.register(self.connection.fd, select.POLLIN | (select.POLLOUT if self.link.pending() else 0))
            left_s = until - time.monotonic()
            assert left_s > 0, self.instance.console_tail()
            poll.poll(left_s * 1000)
            events = self.connection.read()
            assert events is not None, self.instance.console_tail()
            for event in events:
                self._take(event)

    def _take(self, event: object) -> None:
        if isinstance(event, Started):
            self.started.add(event.id)
        elif isinstance(event, (Exited, Failed)):
            assert event.id, event
            self.ended[event.id] = event
        elif isinstance(event, Closed):
            self.closed = event
        elif isinstance(event, Event) and event.type == streams.DATA:
            key = Stream(event.code), self.link.subject(event.stream)
            self.output[key] = self.output.get(key, b"") + event.data
            self.link.streams.consumed(event.stream, len(event.data))


def free_port() -> int:
    """Return a port that nobody uses now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port


@pytest.fixture
def sandbox(backend: Backend) -> Iterator[Sandbox]:
    """An open session."""
    with started(backend) as instance:
        yield Sandbox(instance)


def test_commands_follow_each_other(sandbox: Sandbox) -> None:
    """Each command has an input, outputs and an exit code of its own, and sees what earlier ones have written."""
    assert sandbox.code(sandbox.sh("echo one > shared; exit 3")) == 3
    second = sandbox.exec("cat", "-", "shared", stdin=b"input\n")
    assert (sandbox.code(second), sandbox.text(second)) == (0, "input\none\n")
    sandbox.close()


def test_commands_run_at_once(sandbox: Sandbox) -> None:
    """Commands run at the same time, and megabytes go both ways in each without mixing."""
    commands = [sandbox.exec("cat", stdin=None) for _ in range(3)]
    for command in commands:
        sandbox.until_started(command)
    sent = [bytes([65 + number]) * (3 << 20) for number in range(3)]
    sandbox.write(dict(zip(commands, sent, strict=True)))
    for command, data in zip(commands, sent, strict=True):
        assert sandbox.code(command) == 0
        assert sandbox.text(command).encode() == data


def test_a_background_process_lives_until_the_session_is_closed(sandbox: Sandbox) -> None:
    """A process that a command leaves in the background lives on, and does not delay the command's end."""
    first = sandbox.sh("(while :; do date > beat; sleep 0.1; done) & echo $!")
    assert sandbox.code(first) == 0
    after = sandbox.sh(f"rm -f beat; for i in $(seq 100); do test -e beat && exit 0; sleep 0.1; done; exit 1; {first}")
    assert sandbox.code(after) == 0


def test_closing_ends_the_commands_that_run(sandbox: Sandbox) -> None:
    """Closing a session ends its commands, and what earlier ones left, before anything is sent."""
    mark = f"left-{os.getpid()}"
    assert sandbox.code(sandbox.sh(f"sh -c 'sleep 1000; : {mark}' & exit 0")) == 0
    running = sandbox.sh("echo up; sleep 1000; :")
    sandbox.wait_for(running, "up")
    sandbox.close()
    ended = sandbox.ended[running]
    assert isinstance(ended, Exited)
    assert ended.wait_status == signal.SIGKILL
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [line for line in lines if mark.encode() in line]


def test_a_command_is_stopped_before_its_files_have_arrived(backend: Backend) -> None:
    """A command that waits for the session's files can be stopped, and ends with the session."""
    for close in (False, True):
        with started(backend) as instance:
            sandbox = Sandbox(instance, [InputFile("/x07/in/file", 0o644, "file", 5)])
            command = sandbox.sh("exit 0")
            if close:
                sandbox.close()
            else:
                sandbox.stop(command)
                sandbox.until_ended(command)
            failed = sandbox.ended[command]
            assert isinstance(failed, Failed)
            assert (failed.id, failed.stage, failed.errno) == (command, "exec", 0)


def test_stopping_a_command_ends_its_tree_only(sandbox: Sandbox) -> None:
    """Stopping a command kills its children, and leaves the other commands alone."""
    other = sandbox.exec("cat", stdin=None)
    tree = sandbox.sh("sleep 1000 & sh -c 'echo up; sleep 1000' & wait")
    sandbox.wait_for(tree, "up")
    sandbox.stop(tree)
    assert sandbox.code(tree) == -9
    count = sandbox.sh("ps -e -o args | grep -c '^sleep 1000' || true")
    assert (sandbox.code(count), sandbox.text(count)) == (0, "0\n")
    sandbox.write({other: b"still here\n"})
    assert (sandbox.code(other), sandbox.text(other)) == (0, "still here\n")


def test_stopping_finds_what_left_the_tree_in_the_same_session(sandbox: Sandbox) -> None:
    """Stopping a command also kills processes whose parents have ended, unless they made a session of their own."""
    fork = "import os, time; print(os.fork() and os._exit(0) or 'up', flush=True); time.sleep(4242)"
    tree = sandbox.exec("/bin/sh", "-c", 'python3 -c "$1"; sleep 1000', "sh", fork)
    sandbox.wait_for(tree, "up")
    sandbox.stop(tree)
    assert sandbox.code(tree) == -9
    count = sandbox.sh("ps -e -o args | grep -c '[s]leep(4242' || true")
    assert (sandbox.code(count), sandbox.text(count)) == (0, "0\n")


def test_a_command_is_not_killed_for_the_time_of_another(sandbox: Sandbox) -> None:
    """A command that uses no CPU time is not killed while another one exceeds the limit of both."""
    idle = sandbox.exec("cat", stdin=None, cpu_ms=400)
    sandbox.until_started(idle)
    busy = [sandbox.sh("sh -c 'while :; do :; done'; exit 3", cpu_ms=400) for _ in range(2)]
    for command in busy:
        assert sandbox.code(command) == -9
    sandbox.write({idle: b"x"})
    assert (sandbox.code(idle), sandbox.text(idle)) == (0, "x")


def test_cpu_time_is_counted_for_each_command(sandbox: Sandbox) -> None:
    """A command that exceeds its CPU time is killed; another one goes on."""
    other = sandbox.exec("cat", stdin=None)
    sandbox.until_started(other)
    busy = sandbox.sh("while :; do :; done", cpu_ms=500)
    assert sandbox.code(busy) == -9
    ended = sandbox.ended[busy]
    assert isinstance(ended, Exited)
    assert ended.cpu_exceeded
    sandbox.write({other: b"x"})
    assert sandbox.code(other) == 0


def test_a_missing_command_does_not_end_the_session(sandbox: Sandbox) -> None:
    """A command that does not exist fails alone, as the first one and as a later one."""
    for _ in range(2):
        missing = sandbox.exec("no-such-command")
        sandbox.until_ended(missing)
        failed = sandbox.ended[missing]
        assert isinstance(failed, Failed)
        assert (failed.stage, failed.errno) == ("exec", 2)
        assert sandbox.code(sandbox.sh("exit 4")) == 4


def test_many_commands_leave_nothing_behind(sandbox: Sandbox) -> None:
    """Two hundred commands in a row leave no descriptor, process or memory in the agent."""
    assert sandbox.code(sandbox.sh("exit 0")) == 0
    for number in range(200):
        command = sandbox.sh(f"exit {number % 7}")
        assert sandbox.code(command) == number % 7
    sandbox.close()


def test_commands_inherit_nothing(sandbox: Sandbox) -> None:
    """The first command and later ones have their standard streams and no other descriptor."""
    for _ in range(2):
        command = sandbox.sh("ls /proc/$$/fd")
        assert (sandbox.code(command), sandbox.text(command).split()) == (0, ["0", "1", "2"])


class Files:
    """Requests to the file server of a sandbox."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.command = sandbox.service("files")
        self.buffer = Buffer()
        self.seen = 0

    def ask(self, kind: str, path: str, content: bytes = b"", **how: Any) -> Answer:  # noqa: ANN401
        """Send a request and return its answer."""
        if content:
            how["size"] = len(content)
        self.sandbox.send({self.command: encode(Request(kind, path, **how)) + content})
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

    def tree(self) -> list[object]:
        """Return the events of the tree after an answer."""
        reader = Reader()
        events: list[object] = []

        def ended() -> bool:
            self._fill()
            events.extend(reader.feed(self.buffer.piece(1 << 20)))
            return reader.ended

        self.sandbox.wait(ended)
        return events

    def _fill(self) -> int:
        output = self.sandbox.output.get((Stream.STDOUT, self.command), b"")
        self.buffer.data += output[self.seen :]
        self.seen = len(output)
        return len(self.buffer.data)


def test_files_are_read_and_written(sandbox: Sandbox) -> None:
    """The file server writes, reads in parts, describes, lists and removes files that commands see."""
    files, here = Files(sandbox), sandbox.here()
    assert files.ask("write", f"{here}/a", b"one two three", mode=0o750) == Answer(0)
    assert sandbox.code(sandbox.sh("grep -q 'two' a && test -x a")) == 0
    answer = files.ask("read", f"{here}/a", offset=4, size=3)
    assert (answer.errno, files.rest(answer.size)) == (0, b"two")
    (info,) = files.ask("stat", f"{here}/a").entries
    assert (info.name, info.size, stat.S_IMODE(info.mode)) == ("a", 13, 0o750)
    assert files.ask("make", f"{here}/d/e", whole=True) == Answer(0)
    assert sandbox.code(sandbox.sh("ln -s a link; echo x > d/e/f")) == 0
    listed = {info.name: info.target for info in files.ask("list", here).entries}
    assert listed == {"a": "", "d": "", "link": "a"}
    assert files.ask("remove", f"{here}/d").errno == errno.ENOTEMPTY
    assert files.ask("remove", f"{here}/d", whole=True) == Answer(0)
    assert sandbox.code(sandbox.sh("test ! -e d")) == 0


def test_file_requests_fail_with_the_kernels_errors(sandbox: Sandbox) -> None:
    """A request fails with the error of the kernel, and later requests work."""
    files, here = Files(sandbox), sandbox.here()
    assert sandbox.code(sandbox.sh("mkdir d; ln -s loop loop; : > closed; chmod 0 closed")) == 0
    expected = [
        ("read", f"{here}/missing", errno.ENOENT),
        ("read", f"{here}/d", errno.EISDIR),
        ("read", f"{here}/loop", errno.ELOOP),
        ("write", f"{here}/d", errno.EISDIR),
        ("make", f"{here}/d", errno.EEXIST),
        ("list", f"{here}/closed", errno.ENOTDIR),
        ("put", f"{here}/d", errno.EEXIST),
        ("get", f"{here}/closed", errno.ENOTDIR),
    ]
    for kind, path, number in expected:
        content = b"some bytes" if kind in {"write", "put"} else b""
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


def test_the_file_server_reaches_what_a_program_reaches(confined: OsBackend) -> None:
    """The file server sees the program's folders only, as its user: no link leads out of them."""
    with started(confined) as instance:
        sandbox = Sandbox(instance)
        files = Files(sandbox)
        assert sandbox.code(sandbox.sh("ln -s /proc/1/root/etc out; ln -s /run/x07/scratch in")) == 0
        for path in ("/opt/x07/out/passwd", "/opt/x07/in", "/etc/shadow", "/proc/1/mem"):
            assert files.ask("read", path, size=10).errno in {errno.EACCES, errno.ENOENT, errno.EPERM}, path
        assert files.ask("write", "/usr/bin/new", b"x").errno == errno.EROFS


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


def test_a_stopped_file_server_can_be_ended(sandbox: Sandbox) -> None:
    """A file server that is stopped (SIGSTOP) is killed on request, and another one answers."""
    files = Files(sandbox)
    assert files.ask("stat", "/").errno == 0
    sandbox.stop(files.command, signal.SIGSTOP)
    sandbox.send({files.command: encode(Request("stat", "/"))})
    sandbox.stop(files.command)
    assert sandbox.code(files.command) == -signal.SIGKILL
    assert Files(sandbox).ask("stat", "/").errno == 0


def test_holes_are_not_sent(sandbox: Sandbox) -> None:
    """A sparse file is read whole as segments: holes have no bytes, and its size is not cut to what was asked for."""
    files, here = Files(sandbox), sandbox.here()
    assert sandbox.code(sandbox.sh("printf begin > a; truncate -s 3G a; printf end >> a; truncate -s 5G a")) == 0
    answer = files.ask("read", f"{here}/a", size=1, whole=True)
    assert answer == Answer(0, 5 << 30)
    reader, data, holes = Reader(), bytearray(), 0
    pending = Entry(Kind.FILE, b"a", size=answer.size).encoded()
    while True:
        events = list(reader.feed(pending))
        data += b"".join(event.data for event in events if isinstance(event, Piece))
        holes += sum(event.size for event in events if isinstance(event, Hole))
        if any(isinstance(event, FileEnd) for event in events):
            break
        pending = files.rest(1)
    assert bytes(data.strip(b"\0"))[:5] + bytes(data.rstrip(b"\0"))[-3:] == b"beginend"
    assert (len(data) + holes, len(data) < 1 << 20) == (5 << 30, True)
    for name, content in (("small", b"abc"), ("empty", b"")):
        assert files.ask("write", f"{here}/{name}", content) == Answer(0)
        assert files.ask("read", f"{here}/{name}", whole=True) == Answer(0, len(content))
        assert files.rest(len(segment(3)) + 3 if content else 0) == (segment(3) + content if content else b"")


def test_a_list_of_programs_applies_to_commands_after_a_service(confined: OsBackend) -> None:
    """A policy's list of programs applies to every command, also if the file server is started first."""
    with started(confined) as instance:
        sandbox = Sandbox(instance, confine=FREE._replace(programs=["/bin/sh", "/usr/bin/cat"]))
        assert Files(sandbox).ask("stat", "/").errno == 0
        assert sandbox.code(sandbox.sh("cat /dev/null")) == 0
        assert sandbox.code(sandbox.sh("exec ls /")) == 126


def test_trees_go_in_and_out(sandbox: Sandbox) -> None:
    """A tree with modes, links and empty folders is created in the sandbox, and comes back the same."""
    files, path = Files(sandbox), f"{sandbox.here()}/tree"
    entries = [
        Entry(Kind.FOLDER, b"", mode=0o755, mtime_ns=10**18),
        Entry(Kind.FILE, b"a", mode=0o640, mtime_ns=10**18, size=3),
        Entry(Kind.FOLDER, b"empty", mode=0o700, mtime_ns=10**18),
        Entry(Kind.LINK, b"link", mtime_ns=0, target=b"a"),
    ]
    data = b"".join(one.encoded() + (segment(3) + b"abc" if one.name == b"a" else b"") for one in entries)
    assert files.ask("put", path, data + Entry(Kind.END, b"").encoded()) == Answer(0)
    assert sandbox.code(sandbox.sh("test $(cat tree/link) = abc && test -d tree/empty")) == 0
    assert files.ask("get", path) == Answer(0)
    found = [one for one in files.tree() if isinstance(one, Entry) and one.kind is not Kind.END]
    assert [(one.kind, one.name, one.mode, one.target) for one in found] == [
        (one.kind, one.name, one.mode, one.target) for one in entries
    ]


def test_a_server_inside_is_reached_from_outside(sandbox: Sandbox) -> None:
    """A port of a server in the background is reached on the streams of a command, megabytes both ways."""
    port = free_port()
    source = (
        "import socket, os, sys; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); print('up', flush=True)\n"
        "c, _ = s.accept()\n"
        "while data := c.recv(65536): c.sendall(data.upper())\n"
    )
    server = sandbox.exec("python3", "-c", source, str(port))
    sandbox.wait_for(server, "up")
    there = sandbox.service("connect", str(port))
    sandbox.write({there: b"word " * 500_000})
    assert sandbox.code(there) == 0
    assert sandbox.text(there) == "WORD " * 500_000
    refused = sandbox.service("connect", str(port))
    assert sandbox.code(refused) == 1


def test_standard_error_can_go_to_standard_output(sandbox: Sandbox) -> None:
    """A command whose outputs are merged writes both in order to standard output."""
    for _ in range(2):
        command = sandbox.sh("echo one; echo two >&2; echo three", merge=True)
        assert (sandbox.code(command), sandbox.text(command)) == (0, "one\ntwo\nthree\n")


def test_a_command_can_be_detached(sandbox: Sandbox) -> None:
    """A detached command has no streams."""
    command = sandbox.sh("read line; echo lost; test $? = 0", detached=True)
    assert (sandbox.code(command), sandbox.output) == (0, {})


def test_a_command_can_have_a_terminal(sandbox: Sandbox) -> None:
    """A command with a terminal controls it, sees its size and the end of its input, and hears of a new size."""
    text = (
        "test -t 0 && test -t 1 && tty -s && stty size; trap 'stty size' WINCH; echo ready; cat; stty size < /dev/tty"
    )
    command = sandbox.sh(text, terminal=Terminal(24, 80), stdin=None)
    sandbox.wait_for(command, "ready")
    sandbox.resize(command, 50, 132)
    sandbox.write({command: b"typed\n"})
    assert sandbox.code(command) == 0
    lines = sandbox.text(command).split()
    assert lines[:3] == ["24", "80", "ready"]
    assert sorted(lines[3:]) == ["132", "132", "50", "50", "typed", "typed"]


def test_signals_reach_the_command_alone(sandbox: Sandbox) -> None:
    """A signal other than SIGKILL reaches the process of the command, which may handle it."""
    command = sandbox.sh("trap 'echo heard; exit 5' TERM; echo ready; while :; do sleep 0.05; done")
    sandbox.wait_for(command, "ready")
    sandbox.stop(command, signal.SIGTERM)
    assert (sandbox.code(command), sandbox.text(command)) == (5, "ready\nheard\n")


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
