"""Sandboxes that a process of their own holds: several clients, every way in which one of the parts ends."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import pty
import signal
import socket
import stat
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from tests.command import X07, Done, x07
from tests.process.conftest import wait_until
from tests.vm.conftest import left_behind, marked, owners
from x07_sandbox import AsyncSandbox, Ended, Sandbox, SandboxError
from x07_sandbox.host.linux import process_ids
from x07_sandbox.host.sockets import connected
from x07_sandbox.library.held_messages import Call
from x07_sandbox.library.resident import packed
from x07_sandbox.records.runs import SOCKET, all_runs

if TYPE_CHECKING:
    from collections.abc import Iterator


# Waits for signals that announce a new size of the terminal, until it has 59 rows.
WATCH = (
    "import os, signal as s; s.pthread_sigmask(s.SIG_BLOCK, [s.SIGWINCH]); print('ready', flush=True); "
    "size = os.get_terminal_size; [s.sigwait([s.SIGWINCH]) for _ in iter(lambda: size().lines, 59)]; "
    "print('last', tuple(size()))"
)
SLEEPERS = "cat /proc/[0-9]*/comm 2>/dev/null | grep -c '^sleep$' || true"


@pytest.fixture(autouse=True)
def under_os(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sandboxes are confined processes: what the library promises does not depend on what confines them."""
    monkeypatch.setenv("X07_SANDBOX_BACKEND", "os")
    monkeypatch.setenv("X07_I_ACCEPT_WEAKER_ISOLATION", "1")


@pytest.fixture
def held() -> Iterator[Sandbox]:
    """A sandbox that is held, and closed after the test."""
    opened = Sandbox.create()
    yield opened
    with contextlib.suppress(SandboxError):
        opened.close("discard")


def text(ended: Ended) -> str:
    """The standard output of a command that succeeded."""
    assert ended.ok, (ended.reason, ended.stderr)
    return ended.stdout.decode()


def holder_of(run: str) -> int:
    """The process that holds a sandbox."""
    return int(run.split("-")[1])


def test_two_clients_share_a_sandbox(held: Sandbox) -> None:
    """Every client can use commands, live processes and files, sees what another one made, and gets the same errors."""
    other = Sandbox.connect(held.id)
    assert text(held.shell("echo one > shared; cat", input=b"abc")) == "abc"
    assert text(other.exec(["cat", "shared"])) == "one\n"
    late = held.exec(["sleep", "60"], timeout_s=0.5)
    assert (late.outcome, "0.5 s (timeout_s)" in late.reason) == ("timeout", True)
    held.files.write("new/a.txt", b"content")
    assert other.files.read("new/a.txt") == b"content"
    with pytest.raises(FileNotFoundError) as caught:
        other.files.read("none")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, "none")
    data = os.urandom(3_000_000)
    assert other.exec(["cat"], input=data).stdout == data
    process = held.start(["sh", "-c", "while read -r line; do echo got $line; done; exit 4"])
    process.write(b"one\n")
    assert process.read(timeout_s=60) == b"got one\n"
    process.close_stdin()
    assert process.wait(60).exit_code == 4


def test_commands_of_many_threads_and_clients_run_at_once(held: Sandbox) -> None:
    """Eight threads over two clients, and tasks of asyncio, get the output of their own commands."""
    clients = held, Sandbox.connect(held.id)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda n: text(clients[n % 2].exec(["echo", str(n)])), range(24)))
    assert found == [f"{n}\n" for n in range(24)]

    async def main() -> list[bytes]:
        async with await AsyncSandbox.connect(held.id) as sandbox:
            done = await asyncio.gather(*(sandbox.exec(["echo", word]) for word in ("one", "two")))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(sandbox.exec(["sleep", "600"]), 1)
            return [one.stdout for one in done]

    assert asyncio.run(main()) == [b"one\n", b"two\n"]
    assert text(held.shell(SLEEPERS)) == "0\n"
    assert held.alive


def test_a_client_that_goes_away_ends_its_commands_but_no_detached_one(held: Sandbox) -> None:
    """A command ends with its client, also if that is killed; a detached one stays, and others find it."""
    code = f"""
import sys, time
from x07_sandbox import Sandbox
sandbox = Sandbox.connect({held.id!r})
print(sandbox.start(["sh", "-c", "sleep 2; exit 7"], detach=True).id, flush=True)
sandbox.start(["sh", "-c", "sleep 600 & sleep 600"])
while sandbox.shell({SLEEPERS!r}).stdout != b"3\\n":
    pass
print("ready", flush=True)
time.sleep(600)
"""
    client = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert client.stdout is not None
    number = int(client.stdout.readline())
    assert client.stdout.readline() == b"ready\n"
    client.kill()
    client.communicate()
    wait_until(lambda: int(text(held.shell(SLEEPERS))) <= 1)
    for _ in range(2):  # its end is kept
        assert held.process(number).wait(60).exit_code == 7
    with pytest.raises(SandboxError, match="no detached command has this id"):
        held.process(number + 1)


def test_the_name_tags_and_facts_of_a_sandbox(held: Sandbox) -> None:
    """Sandboxes are found by name, id, start of an id and tags; a name is used once; others cannot be connected to."""
    with Sandbox.create(name="one", tags={"job": "17", "kind": "test"}, image=None, memory=None) as named:
        assert [one.id for one in Sandbox.list({"job": "17"})] == [named.id]
        assert {held.id, named.id} <= {one.id for one in Sandbox.list()}
        assert Sandbox.list({"job": "18"}) == []
        with pytest.raises(SandboxError, match="has the name one"):
            Sandbox.create(name="one")
        process = Sandbox.connect("one").start(["sleep", "600"])
        (facts,) = Sandbox.list({"kind": "test"})
        assert (facts.name, facts.held, facts.commands, facts.backend) == ("one", True, 1, "os")
        assert facts.left_s is not None
        assert 0 < facts.left_s <= 3600
        named.extend(100)
        (facts,) = Sandbox.list({"kind": "test"})
        assert facts.left_s is not None
        assert facts.left_s <= 100
        process.kill()
    assert named.id in {one.id for one in Sandbox.list()}  # the end of the block has left it open
    assert Sandbox.connect("one").close().outcome == "ok"
    with Sandbox(tags={"kind": "own"}) as own:
        (facts,) = Sandbox.list({"kind": "own"})
        assert (facts.id, facts.held, facts.left_s, facts.commands) == (own.id, False, None, None)
        with pytest.raises(SandboxError, match="belongs to the process that opened it"):
            Sandbox.connect(own.id)
    for word in ("one", "99", ""):
        with pytest.raises(SandboxError, match="cannot find"):
            Sandbox.connect(word)


def test_the_end_of_a_sandbox_reaches_all_its_clients(tmp_path: Path, state: Path) -> None:
    """After a close, every client has the result, running commands raise, and the changes are applied."""
    (tmp_path / "work").mkdir()
    first = Sandbox.create(workdir=tmp_path / "work")
    second, third = Sandbox.connect(first.id), Sandbox.connect(first.id)
    process = second.start(["sleep", "600"])
    first.shell("echo 1 > new.txt")
    assert [one.name for one in second.changes().changes.names] == ["new.txt"]
    result = first.close()
    assert (result.outcome, result.changes.state, len(result.commands)) == ("ok", "applied", 3)  # one looks for bash
    with pytest.raises(SandboxError, match="closed"):
        process.wait(60)
    assert (second.alive, second.result) == (False, result)
    third.disconnect()
    assert third.close() == result
    assert second.close() == result
    with pytest.raises(SandboxError, match="it was closed"):
        second.exec(["true"])
    assert (tmp_path / "work/new.txt").read_text() == "1\n"
    wait_until(lambda: not left_behind(state))
    wait_until(lambda: not (all_runs() / first.id / SOCKET).exists())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_holder_that_ends_leaves_nothing_and_applies_nothing(number: int, tmp_path: Path, state: Path) -> None:
    """After SIGTERM the changes are kept, after SIGKILL they are lost, and both times clients are told."""
    (tmp_path / "work").mkdir()
    opened = Sandbox.create(workdir=tmp_path / "work")
    opened.shell("echo 1 > new.txt")
    process = opened.start(["sleep", "600"])
    (owner,) = owners(state)
    os.kill(holder_of(opened.id), number)
    with pytest.raises(SandboxError, match="cannot use the sandbox"):
        process.wait(60)
    wait_until(lambda: not marked(str(owner["instance"])))
    assert Sandbox.list() == []
    with pytest.raises(SandboxError, match="it has ended"):
        Sandbox.connect(opened.id)
    assert x07(tmp_path, "sweep").code == 0
    assert left_behind(state) == []
    assert list((tmp_path / "work").iterdir()) == []
    if number == signal.SIGTERM:
        ended = opened.close()
        assert (ended.outcome, ended.changes.state, "SIGTERM" in ended.reason) == ("cancelled", "kept", True)
    patch = x07(tmp_path, "diff", opened.id)
    assert (b"+1" in patch.out) == (number == signal.SIGTERM), patch.err


def gates_of(holder: int) -> list[int]:
    """The gate processes below a holder."""

    def parent(pid: int) -> int:
        return int(Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[1])

    found = []
    for pid in process_ids():
        with contextlib.suppress(OSError):
            if b"network.gate import" in Path(f"/proc/{pid}/cmdline").read_bytes() and holder in {parent(pid), pid}:
                found.append(pid)
    return found


def test_a_sandbox_that_loses_its_gate_tells_its_clients(tmp_path: Path, state: Path) -> None:
    """If the gate is killed, the next command ends the sandbox, nothing is applied, and nothing is left."""
    (tmp_path / "work").mkdir()
    opened = Sandbox.create(workdir=tmp_path / "work", allow_hosts=["example.org:443"])
    opened.shell("echo 1 > new.txt")
    (gate,) = gates_of(holder_of(opened.id))
    os.kill(gate, signal.SIGKILL)
    with pytest.raises(SandboxError, match="cannot use the sandbox"):
        opened.exec(["sleep", "60"])
    wait_until(lambda: not opened.alive)
    assert opened.result is not None
    assert (opened.result.outcome, opened.result.changes.state) == ("gate-lost", "discarded")
    wait_until(lambda: not left_behind(state))
    assert list((tmp_path / "work").iterdir()) == []


def test_a_killed_creator_leaves_no_sandbox(state: Path) -> None:
    """If the creator is killed before it knows the id, the holder ends too."""
    creator = subprocess.Popen([*X07, "sandbox", "create"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{creator.pid}/task/{creator.pid}/children")
    wait_until(children.read_text)
    holder = int(children.read_text())
    wait_until(lambda: b"x07_sandbox.library.holder" in Path(f"/proc/{holder}/cmdline").read_bytes())
    os.kill(holder, signal.SIGSTOP)  # it cannot report its id before the creator is gone
    try:
        creator.kill()
        creator.wait()
    finally:
        os.kill(holder, signal.SIGCONT)
    wait_until(lambda: not Path(f"/proc/{holder}").exists())
    assert Sandbox.list() == []
    assert not left_behind(state)


@pytest.mark.parametrize("data", [b"", b"\xff" * 64, b"\0\0\0\1\xc0", b"\0\0\0\4\x91\xa5W"])
def test_malformed_bytes_on_the_socket_harm_nobody(held: Sandbox, data: bytes) -> None:
    """A connection that sends nonsense is closed, and the sandbox goes on."""
    with socket.socket(socket.AF_UNIX) as connection:
        folder = os.open(all_runs() / held.id, os.O_PATH)
        connection.connect(f"/proc/self/fd/{folder}/{SOCKET}")
        os.close(folder)
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(30)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    assert text(held.exec(["echo", "on"])) == "on\n"


LISTENER = """
import os, socket
os.setgid(65534); os.setuid(65534)
listener = socket.socket(socket.AF_UNIX)
listener.bind("/proc/self/fd/{}/socket")
listener.listen()
print("ready", flush=True)
print(listener.accept()[0].recv(1))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_socket_of_another_user_is_not_used(tmp_path: Path) -> None:
    """A client sends nothing to a process of another user that listens in the place of a holder."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    theirs.chmod(0o777)
    folder = os.open(theirs, os.O_PATH)
    code = LISTENER.format(folder)
    with subprocess.Popen([sys.executable, "-c", code], pass_fds=(folder,), stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"ready\n"
        with pytest.raises(PermissionError, match="belongs to another user"):
            connected(theirs, "socket", 60).sendall(b"x")
        assert other.stdout.read() == b"b''\n"
    os.close(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_another_user_cannot_connect(held: Sandbox) -> None:
    """Even with a way to the socket, another user's connection is not served, and its owner is not asked."""
    place = all_runs() / held.id
    folder = os.open(place, os.O_PATH)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (place, place / SOCKET)] == [0o700, 0o600]
    place.chmod(0o711)  # either mode alone would refuse it
    (place / SOCKET).chmod(0o777)
    code = f"""
import os, socket
os.setgid(65534); os.setuid(65534)
connection = socket.socket(socket.AF_UNIX)
connection.connect("/proc/self/fd/{folder}/{SOCKET}")
connection.settimeout(60)
try:
    connection.sendall({packed(Call("status", ()))!r})
    print(connection.recv(1))
except (BrokenPipeError, ConnectionResetError):  # it was closed before that
    print(b"")
"""
    tried = subprocess.run(
        [sys.executable, "-c", code], pass_fds=(folder,), capture_output=True, check=False, timeout=60
    )
    os.close(folder)
    assert tried.stdout == b"b''\n", tried
    assert text(held.exec(["echo", "on"])) == "on\n"


def test_clients_that_leave_take_nothing_with_them(held: Sandbox) -> None:
    """Clients that come and go, also without a word, leave no descriptor and no thread in the holder."""

    def load() -> tuple[int, int]:
        place = Path(f"/proc/{holder_of(held.id)}")
        return len(list((place / "fd").iterdir())), len(list((place / "task").iterdir()))

    assert held.exec(["true"]).ok
    before = load()
    for number in range(20):
        client = Sandbox.connect(held.id)
        assert client.exec(["true"]).ok
        if number % 2:
            client.disconnect()
        del client
    wait_until(lambda: load() <= before)


# the command line


def test_the_commands_of_x07_sandbox(tmp_path: Path) -> None:
    """Create, exec, cp, ls, list and close do what their help says, with exit codes and JSON."""
    work = tmp_path / "work"
    for name in (".git", ".github", "out"):
        (work / name).mkdir(parents=True)
    (work / "a.txt").write_text("1\n")

    def sandbox(*words: str, stdin: bytes = b"") -> Done:
        return x07(work, "sandbox", *words, stdin=stdin)

    made = sandbox("create", "--name", "build", "--workdir", ".", "--tag", "job=17", "--idle", "600")
    assert made.code == 0, made.err
    assert "denied: copying .git into the VM. To allow it, use --git\n" in made.err
    assert "denied: copying .github into the VM (hidden name" in made.err
    listed = msgspec.json.decode(sandbox("list", "--json").out)["sandboxes"]
    assert [(one["subject"], one["count"]) for one in listed[0]["left_out"]] == [(".git", 1), (".github", 1)]
    with Sandbox.connect("build") as client:
        flags = [one.how_to_allow and one.how_to_allow.flag for one in client.left_out]
        assert flags == ["--git", "--allow-hidden"]
    run = made.out.decode().strip()
    assert sandbox("create", "--name", "build").code == 2
    assert sandbox("exec", "build", "--", "sh", "-c", "cat; echo err >&2; exit 3", stdin=b"abc") == (3, b"", "err\n")
    assert sandbox("exec", "-i", run, "--", "cat", stdin=b"abc").out == b"abc"
    done = sandbox("exec", "--timeout", "0.5", "build", "--", "sleep", "60")
    assert (done.code, "0.5 s (--timeout)" in done.err) == (124, True)
    done = sandbox("exec", "build", "--", "no-such-command")
    assert (done.code, "is not installed on this host" in done.err) == (127, True)
    shown = msgspec.json.decode(sandbox("exec", "--json", "build", "--", "echo", "hi").out)
    assert (shown["outcome"], shown["stdout"]["text"], shown["sandbox"]) == ("ok", "hi\n", run)
    done = sandbox("exec", "--env", "A=1", "--cwd", "/", "build", "--", "sh", "-c", "echo $A; pwd")
    assert done.out == b"1\n/\n"
    assert sandbox("cp", "a.txt", "build:b.txt").code == 0
    rows = msgspec.json.decode(sandbox("ls", "--json", "build").out)["files"]
    assert [(row["name"], row["size"]) for row in rows if row["kind"] == "file"] == [("a.txt", 2), ("b.txt", 2)]
    assert b" 2 " in sandbox("ls", "build", "b.txt").out
    assert sandbox("cp", "build:b.txt", "out").code == 0
    assert (work / "out/b.txt").read_text() == "1\n"
    for words in (("none", "build:x"), ("build:none", "x"), ("a.txt", "out"), ("build:a", "build:b")):
        assert sandbox("cp", *words).code == 2
    assert b"job=17" in sandbox("list").out
    assert sandbox("list", "--tag", "job=18").out.count(b"\n") == 1
    closed = sandbox("close", "build")
    assert (closed.code, "applied" in closed.err, "denied" in closed.err) == (0, True, False)
    assert (work / "b.txt").read_text() == "1\n"
    assert sandbox("exec", "build", "--", "true").code == 2
    assert sandbox("exec").code == 2


def test_ctrl_c_kills_the_command_and_not_the_sandbox(held: Sandbox) -> None:
    """SIGINT ends `x07 sandbox exec` with status 130 and kills its command; a closed pipe does the same."""
    running = subprocess.Popen([*X07, "sandbox", "exec", held.id, "--", "sleep", "600"])
    wait_until(lambda: text(held.shell(SLEEPERS)) == "1\n")
    running.send_signal(signal.SIGINT)
    assert running.wait(60) == 130
    assert text(held.shell(SLEEPERS)) == "0\n"
    piped = f"{' '.join(X07)} sandbox exec {held.id} -- yes | head -1"
    assert subprocess.run(["/bin/sh", "-c", piped], capture_output=True, check=True, timeout=60).stdout == b"y\n"


def test_a_port_is_forwarded_until_ctrl_c(held: Sandbox, tmp_path: Path) -> None:
    """`x07 sandbox forward` prints the address, carries connections, and ends with its client or the sandbox."""
    held.files.write("hello.txt", b"hello")
    held.start(["python3", "-m", "http.server", "8000"], detach=True)
    path = tmp_path / "server.sock"
    argv = [*X07, "sandbox", "forward", "--unix", str(path), held.id, "8000"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline().decode().strip() == str(path)
        found = b""
        until = time.monotonic() + 60
        while b"hello" not in found and time.monotonic() < until:  # until the server listens
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(path))
                connection.sendall(b"GET /hello.txt HTTP/1.0\r\n\r\n")
                found = b"".join(iter(lambda: connection.recv(65536), b""))
        assert found.endswith(b"hello")
        assert path.stat().st_mode & 0o777 == 0o600
        held.close("discard")
        assert running.wait(60) == 0
    assert not path.exists()


def test_a_terminal_has_size_job_control_and_an_end(held: Sandbox, launcher: Path) -> None:
    """`exec -it` gives the command a terminal: size, kind, Ctrl-C for the command alone, and the exit status."""
    pid, master = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "tmux-256color"
        os.execv(launcher, ["x07", "sandbox", "exec", "-it", held.id, "--", "sh"])  # noqa: S606 - no shell is needed

    def until(end: bytes) -> bytes:
        data = b""
        while end not in data:
            data += os.read(master, 65536)
        return data

    os.write(master, b"stty size\n")
    until(b"24 80\r\n")
    os.write(master, f'echo kind=$TERM; python3 -c "{WATCH}"\n'.encode())
    assert b"kind=tmux-256color\r\n" in until(b"\nready\r\n")
    for rows in range(30, 60):
        termios.tcsetwinsize(master, (rows, 100))
    until(b"last (100, 59)\r\n")
    os.write(master, b"sleep 600; echo after=$?\n")
    wait_until(lambda: text(held.shell(SLEEPERS)) == "1\n")
    os.write(master, b"\x03")
    os.write(master, b"echo st=$?\n")
    assert b"st=130" in until(b"st=130")
    os.write(master, b"exit 5\n")
    with contextlib.suppress(OSError):  # the end of a terminal is an error
        while os.read(master, 65536):
            pass
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
    os.close(master)


def test_a_command_may_end_before_it_has_read_its_input(held: Sandbox) -> None:
    """A command that leaves most of its input unread ends with its own status and output."""
    for number in range(8):
        found = held.exec(["sh", "-c", f"head -c 5; echo err >&2; exit {number}"], input=b"12345" + bytes(5 << 20))
        assert (found.exit_code, found.stdout, found.stderr) == (number, b"12345", b"err\n")


def test_callers_that_need_a_sandbox_of_a_name_at_once_share_one() -> None:
    """Of many callers at the same time one opens the sandbox, and the others connect to it; later ones too."""
    name = "conversation-7"
    with ThreadPoolExecutor(6) as pool:
        found = [*pool.map(lambda _: Sandbox.get_or_create(name, tags={"of": "a test"}), range(6))]
    try:
        assert len({one.id for one in found}) == 1
        assert [one.name for one in Sandbox.list({"of": "a test"})] == [name]
        found[0].files.write("state", b"1")

        async def again() -> bytes:
            sandbox = await AsyncSandbox.get_or_create(name, memory="64M")  # options have no effect any more
            return await sandbox.files.read("state")

        assert asyncio.run(again()) == b"1"
    finally:
        found[0].close()
    with Sandbox.get_or_create(name) as new:
        assert new.id != found[0].id
        new.close()
    with pytest.raises(SandboxError, match="its id is empty"):
        Sandbox.get_or_create("")


def test_output_of_a_detached_command_is_kept_for_clients_that_come_later(held: Sandbox) -> None:
    """Several later clients each get what is kept, while it runs and at its end, and the command waits for none."""
    more = "read x < go; echo last; echo why >&2; exit 3"
    number = held.start(["sh", "-c", f"mkfifo go; echo first; seq 300000; {more}"], detach=True).id
    clients = [Sandbox.connect(held.id) for _ in range(2)]
    early = clients[0].process(number)
    early.read_until(b"\n300000\n", timeout_s=60)  # more than the kernel's pipes and all windows hold
    clients[0].disconnect()
    held.shell("echo > go", check=True)
    late = clients[1].process(number)
    ended = late.wait(60)
    assert (ended.exit_code, ended.stderr) == (3, b"why\n")
    assert ended.stdout.endswith(b"\n300000\nlast\n")
    assert 0 <= len(ended.stdout) - (1 << 20) <= len("last\n")  # the end of 2 MB, and what came later
    clients[1].disconnect()


def test_a_sandbox_of_this_process_keeps_output_of_detached_commands_too() -> None:
    """A detached command of a sandbox that nobody holds has its output at its end, and never waits for a reader."""
    with Sandbox() as sandbox:
        process = sandbox.start(["sh", "-c", "seq 1000000; echo end"], detach=True)
        ended = process.wait(60)
        assert ended.ok
        assert ended.stdout.endswith(b"1000000\nend\n")
        with pytest.raises(BrokenPipeError):
            process.write(b"x")


def test_a_detached_command_can_be_attached_from_the_command_line(held: Sandbox, tmp_path: Path) -> None:
    """`x07 sandbox attach` prints what is kept and what follows, and exits with the command's exit code."""
    started = x07(tmp_path, "sandbox", "exec", "--detach", held.id, "--", "sh", "-c", "echo out; echo err >&2; exit 5")
    number = started.out.decode().strip()
    wait_until(lambda: held.shell("true").ok)
    done = x07(tmp_path, "sandbox", "attach", held.id, number)
    assert (done.code, done.out) == (5, b"out\n")
    assert "err\n" in done.err
    assert x07(tmp_path, "sandbox", "attach", held.id, number) == done
    other = x07(tmp_path, "sandbox", "attach", held.id, "99")
    assert (other.code, "no detached command has this id" in other.err) == (2, True)
    assert x07(tmp_path, "sandbox", "attach", held.id, "first").code == 2


def test_only_the_last_detached_commands_are_kept(held: Sandbox) -> None:
    """Of many detached commands that nobody asks for, the last 32 that ended can be asked for, and no others."""
    held.shell("mkfifo go", check=True)
    with Sandbox.connect(held.id) as client:
        numbers = [client.start(["sh", "-c", f"read x < go; echo {count}"], detach=True).id for count in range(40)]
    shells = ["sh", "-c", "cat /proc/[0-9]*/comm | grep -c '^sh$'"]
    wait_until(lambda: text(held.exec(shells)) == "41\n")
    held.shell(": > go", check=True)
    wait_until(lambda: text(held.exec(shells)) == "1\n")
    last = held.start(["true"], detach=True).id
    with Sandbox.connect(held.id) as client:
        assert client.process(last).wait(60).ok
        found = []
        for count, number in enumerate(numbers):
            with contextlib.suppress(SandboxError):  # no detached command has this id
                found.append(client.process(number).wait(60).stdout == b"%d\n" % count)
    assert found == [True] * 31  # and `true`


def test_ctrl_c_leaves_an_attached_command_running(held: Sandbox) -> None:
    """Ctrl-C ends `x07 sandbox attach`, and not the detached command; what it prints later can still be read."""
    number = held.start(["sh", "-c", "echo here; mkfifo go; read x < go; echo more"], detach=True).id
    attach = subprocess.Popen([*X07, "sandbox", "attach", held.id, str(number)], stdout=subprocess.PIPE)
    assert attach.stdout is not None
    assert attach.stdout.readline() == b"here\n"
    attach.send_signal(signal.SIGINT)
    assert attach.wait(60) == 130
    attach.stdout.close()
    assert held.process(number).poll() is None
    held.shell("echo > go", check=True)
    with Sandbox.connect(held.id) as client:
        assert client.process(number).wait(60).stdout == b"here\nmore\n"
