"""Sandboxes from Python: many commands, files, streams, several threads, and every way in which a sandbox ends."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.command import X07
from tests.vm.conftest import left_behind, marked, owners
from x07_sandbox import AsyncSandbox, Ended, Process, Sandbox, SandboxError
from x07_sandbox.library import forwarding
from x07_sandbox.records.runs import all_runs
from x07_sandbox.sessions.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("only_os")


TMP = "/tmp"  # noqa: S108 - the guest's
SLEEPING = "cat /proc/[0-9]*/comm 2>/dev/null | grep -c '^sleep$' || true"
SILENT = """
import select, socket
server = socket.create_server(("127.0.0.1", 8000), backlog=200)
print("here", flush=True)
watched, kept = [server], []
while True:
    for one in select.select(watched, [], [])[0]:
        if one is server:
            watched.append(server.accept()[0])
        else:
            watched.remove(one)
            kept.append(one)
            if one.recv(3):
                one.sendall(b"hello")
"""
SLEEPER = ["sh", "-c", "echo begun; sleep 600 & sleep 600"]


def text(ended: Ended) -> str:
    """The standard output of a command that succeeded."""
    assert ended.ok, (ended.reason, ended.stderr)
    return ended.stdout.decode()


def names(folder: Path) -> list[str]:
    """The names in a folder of the host."""
    return sorted(path.name for path in folder.iterdir())


def until(process: Process, end: bytes) -> bytes:
    """The output of a process up to *end*."""
    data = b""
    while not data.endswith(end):
        data += process.read(timeout_s=60)
    return data


# commands


def test_commands_share_the_sandbox_and_report_how_they_ended(shared: Sandbox) -> None:
    """Each command has its own result: output, exit code or signal, and times."""
    assert text(shared.exec(["sh", "-c", "echo one > /tmp/shared; pwd"])) == "/opt/x07\n"
    assert text(shared.exec(["cat", f"{TMP}/shared"])) == "one\n"
    failed = shared.exec(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (failed.outcome, failed.exit_code, failed.stdout, failed.stderr) == ("failed", 3, b"out\n", b"err\n")
    killed = shared.exec(["sh", "-c", "kill -SEGV $$"])
    assert (killed.outcome, killed.signal, killed.exit_code) == ("signalled", signal.SIGSEGV, None)
    codes = [(ended.reason_code, ended.x07_exit_code) for ended in (failed, killed)]
    assert codes == [("exited", 3), ("signal", 128 + signal.SIGSEGV)]
    slept = shared.exec(["sleep", "0.3"])
    assert 300 <= slept.wall_ms < 20_000
    assert slept.cpu_ms < slept.wall_ms


def test_input_environment_and_folder_are_those_of_the_call(shared: Sandbox) -> None:
    """Standard input is at its end unless given, and variables and folder hold for one command only."""
    assert text(shared.exec(["cat"])) == ""
    data = os.urandom(3_000_000)
    found = text(shared.exec(["sha256sum"], input=data))
    assert found.split()[0] == hashlib.sha256(data).hexdigest()
    assert text(shared.exec(["sh", "-c", "echo $ONE; pwd"], env={"ONE": "1"}, cwd=TMP)) == f"1\n{TMP}\n"
    assert text(shared.exec(["sh", "-c", "echo $ONE; pwd"])) == "\n/opt/x07\n"


def test_shell_is_bash(shared: Sandbox) -> None:
    """`shell` runs bash where there is one, and merges streams in order if asked."""
    assert text(shared.shell("set -o pipefail; echo ${BASH_VERSION:+bash} | cat")) == "bash\n"
    assert text(shared.shell("echo 1; echo 2 >&2; echo 3", merge=True)) == "1\n2\n3\n"


def test_a_mebibyte_of_arguments_arrives(shared: Sandbox) -> None:
    """A command may have a mebibyte of arguments, and its environment fits too."""
    words = ["x" * (1 << 16)] * 16
    assert shared.exec(["printf", "%s", *words], env={"ONE": "1"}).stdout == b"".join(word.encode() for word in words)


def test_a_timeout_kills_the_tree_and_keeps_the_output(shared: Sandbox) -> None:
    """At its timeout a command ends with all its processes, its output is kept, and the sandbox stays open."""
    ended = shared.exec(SLEEPER, timeout_s=1)
    assert (ended.outcome, ended.stdout) == ("timeout", b"begun\n")
    assert "1 s (timeout_s)" in ended.reason
    assert text(shared.shell(SLEEPING)) == "0\n"


def test_long_output_is_cut_as_asked(shared: Sandbox) -> None:
    """Of a longer stream, the asked part is kept, such as half of its head and half of its tail; the result says so."""
    words = ["printf", "%s", "01234abcdefghijklmnopqrstuvwxyzGHIJK"]
    ended = shared.exec(words, max_output_bytes=10, keep="both")
    assert (ended.stdout, ended.truncated) == (b"01234\n[... 26 bytes left out ...]\nGHIJK", True)
    assert not shared.exec(["printf", "%s", "0123456789"], max_output_bytes=10).truncated


def test_output_streams_to_a_function(shared: Sandbox) -> None:
    """on_output gets the output as it arrives, and may use the sandbox."""
    seen: list[tuple[str, bytes]] = []

    def take(name: str, data: bytes) -> None:
        if not seen:
            shared.files.write(f"{TMP}/go", b"")
        seen.append((name, data))

    script = "echo first; while [ ! -e /tmp/go ]; do sleep 0.1; done; echo second >&2; rm /tmp/go"
    ended = shared.shell(script, on_output=take)
    assert (seen[0], b"".join(data for _, data in seen)) == (("stdout", b"first\n"), b"first\nsecond\n")
    assert (ended.stdout, ended.stderr) == (b"first\n", b"second\n")


def test_a_function_that_raises_ends_only_its_command(shared: Sandbox) -> None:
    """If on_output raises, the command is killed, and exec raises the exception."""

    def refuse(_name: str, _data: bytes) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shared.exec(SLEEPER, on_output=refuse)
    deadline = time.monotonic() + 30
    while text(shared.shell(SLEEPING)) != "0\n":
        assert time.monotonic() < deadline
    assert shared.alive


def test_check_raises_for_a_failure(shared: Sandbox) -> None:
    """With check, a command that fails raises an error that has its result."""
    with pytest.raises(SandboxError, match="ended as failed") as raised:
        shared.exec(["false"], check=True)
    assert isinstance(raised.value.result, Ended)


def test_several_threads_use_one_sandbox(shared: Sandbox) -> None:
    """Eight threads run commands and use files at once, and each gets its own answers."""

    def use(number: int) -> str:
        shared.files.write(f"{TMP}/of-{number}", str(number).encode() * 1000)
        found = text(shared.exec(["cat", f"{TMP}/of-{number}", "-"], input=b"end"))
        return found if shared.files.read(f"{TMP}/of-{number}").decode() + "end" == found else "another"

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(use, range(8))) == [f"{str(number) * 1000}end" for number in range(8)]


def test_a_command_opens_its_standard_streams_by_name(shared: Sandbox) -> None:
    """The files /dev/stdin, /dev/stdout and /dev/stderr can be opened."""
    found = shared.exec(["sh", "-c", "cat /dev/stdin > /dev/stdout; echo err > /dev/stderr"], input=b"in")
    assert (found.exit_code, found.stdout, found.stderr) == (0, b"in", b"err\n")


def test_input_for_a_command_that_has_ended_is_an_error(shared: Sandbox) -> None:
    """Writing to a command that has ended raises BrokenPipeError, and queues nothing."""
    process = shared.start(["true"])
    process.wait()
    with pytest.raises(BrokenPipeError):
        process.write(b"x")


def test_a_live_process_is_written_read_and_ended(shared: Sandbox) -> None:
    """A process takes input and gives output while it runs; polling and waiting do not lose output."""
    process = shared.start(["python3", "-u", "-c", "for line in iter(input, 'end'): print(eval(line))"])
    process.write(b"6 * 7\n")
    assert until(process, b"\n") == b"42\n"
    for waiting in (process.read, process.wait):
        with pytest.raises(TimeoutError):
            waiting(timeout_s=0.2)
    assert process.poll() is None
    assert shared.process(process.id).poll() is None
    process.write(b"'last'\nend\n")
    ended = process.wait(60)
    assert (ended.outcome, ended.stdout) == ("ok", b"last\n")
    assert process.read() == b""
    with pytest.raises(SandboxError, match="there is no command"):
        shared.process(process.id)


def test_a_process_may_be_iterated_and_signalled(shared: Sandbox) -> None:
    """Iterating yields output as it arrives, and a signal reaches the command."""
    process = shared.start(["sh", "-c", "trap 'echo got it; exit 5' TERM; echo ready; while :; do sleep 0.1; done"])
    seen = b""
    for stream, data in process:
        assert stream == "stdout"
        seen += data
        if seen == b"ready\n":
            process.signal(signal.SIGTERM)
    assert (seen, process.wait().exit_code) == (b"ready\ngot it\n", 5)


def test_the_folder_of_the_first_command_may_be_missing(state: Path) -> None:
    """If the folder of the first command does not exist, the error says so, and the sandbox stays open."""
    with Sandbox() as opened:
        ended = opened.exec(["cat"], cwd="/missing")
        assert (ended.outcome, "No such file or directory" in ended.reason) == ("refused", True)
        assert text(opened.exec(["echo", "on"])) == "on\n"
    assert left_behind(state) == []


def test_wrong_calls_are_errors_and_harm_nothing(shared: Sandbox) -> None:
    """A call that makes no sense raises an error that says why, and starts no command."""
    for call, why in (
        (lambda: shared.exec("true"), "argv is not a list"),
        (lambda: shared.exec([]), "argv is not a list"),
        (lambda: shared.exec(["a\0b"]), "NUL"),
        (lambda: shared.exec(["true"], timeout_s=0), "timeout_s is 0"),
        (lambda: shared.exec(["cat"], input="text"), "input is 'text'"),  # type: ignore[arg-type]
        (lambda: shared.exec(["true"], max_output_bytes=-1), "max_output_bytes is -1"),
        (lambda: shared.exec(["true"], cwd="x" * 5000), "longer than 4095 bytes"),
        (lambda: shared.files.write("a", b"", mode="644"), "it is '644'"),  # type: ignore[arg-type]
        (lambda: shared.close("discrad"), "changes is 'discrad'"),  # type: ignore[arg-type]
        (lambda: shared.exec(["true"], env={"X07_A": "1"}), "reserved"),
        (lambda: shared.exec(["true"], keep="middle"), "keep is 'middle'"),  # type: ignore[arg-type]
        (lambda: shared.shell(["true"]), "list, not str"),  # type: ignore[arg-type]
        (lambda: Sandbox(lifetime_s=-1), "lifetime_s is -1"),
        (lambda: Sandbox(memory="much"), "memory is 'much'"),
        (lambda: Sandbox(backend="no"), "there is no such backend"),
    ):
        with pytest.raises(SandboxError) as raised:
            call()
        assert why in str(raised.value)
    assert text(shared.exec(["echo", "fine"])) == "fine\n"


# files


def test_files_are_read_and_written_as_the_programs_user(shared: Sandbox) -> None:
    """Files have the modes and owner of the program's user, parents are made, and parts can be read."""
    files = shared.files
    files.write("new/folder/file", b"content", mode=0o600)
    assert text(shared.exec(["stat", "-c", "%U %a %s", "new/folder/file"])) == "x07 600 7\n"
    assert files.read("new/folder/file", offset=2, max_bytes=3) == b"nte"
    files.write("new/folder/file", b"less")
    info = files.stat("new/folder/file")
    assert (info.name, info.kind, info.mode, info.size) == ("file", "file", 0o600, 4)
    shared.exec(["ln", "-s", "folder", "new/link"], check=True)
    assert [(one.name, one.kind, one.target) for one in files.list("new")] == [
        ("folder", "folder", ""),
        ("link", "link", "folder"),
    ]
    assert files.exists("new/link/file")
    assert files.stat("new/link", follow=False).kind == "link"
    files.mkdir("new/a/b")
    files.remove("new", recursive=True)
    assert not files.exists("new")


def test_a_file_that_shrinks_is_an_error(shared: Sandbox) -> None:
    """Reading a file that becomes shorter meanwhile raises OSError, and later requests work."""
    path, size, raised = f"{TMP}/shrinks", 200 << 20, 0
    for delay_s in (0.05, 0.02, 0.1, 0.2, 0.4, 0.01) * 3:  # the moment may come before or after the reading
        cut = shared.start(["sh", "-c", f"truncate -s {size} {path}; echo; read go; truncate -s 300000 {path}"])
        cut.read()
        later = threading.Timer(delay_s, cut.write, args=(b"\n",))
        later.start()
        try:
            assert len(shared.files.read(path, max_bytes=size)) in {size, 300_000}
        except OSError as exc:
            assert "shorter" in str(exc)  # noqa: PT017 - it need not be raised
            raised += 1
        later.join()
        assert cut.wait().ok
        assert len(shared.files.read(path)) == 300_000
        if raised:
            break
    assert raised


def test_files_without_a_size_are_copied_whole(shared: Sandbox, tmp_path: Path) -> None:
    """Local pipes, and files of /proc on either side, are read to their end."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(b"from a pipe",))
    writer.start()
    shared.upload(tmp_path / "pipe", f"{TMP}/pipe")
    writer.join()
    assert shared.files.read(f"{TMP}/pipe") == b"from a pipe"
    shared.upload("/proc/self/smaps", f"{TMP}/maps")
    assert len(shared.files.read(f"{TMP}/maps")) > 1 << 14
    assert len(shared.files.read("/proc/kallsyms")) > 1 << 20


def test_trees_go_in_and_out(shared: Sandbox, tmp_path: Path) -> None:
    """A folder is copied with modes, links and empty folders, in and out; a file with its mode."""
    tree = tmp_path / "tree"
    (tree / "empty").mkdir(parents=True)
    (tree / "run").write_bytes(b"#!/bin/sh\necho run\n")
    (tree / "run").chmod(0o755)
    (tree / "link").symlink_to("run")
    (tree / "hole").write_bytes(b"")
    os.truncate(tree / "hole", 5_000_000)
    shared.upload(tree, f"{TMP}/tree")
    assert text(shared.exec([f"{TMP}/tree/link"])) == "run\n"
    shared.download(f"{TMP}/tree", tmp_path / "back")
    back = tmp_path / "back"
    assert sorted(path.name for path in back.iterdir()) == ["empty", "hole", "link", "run"]
    assert (os.readlink(back / "link"), (back / "run").stat().st_mode & 0o777) == ("run", 0o755)  # noqa: PTH115
    assert ((back / "hole").stat().st_size, list((back / "empty").iterdir())) == (5_000_000, [])
    shared.download(f"{TMP}/tree/run", tmp_path / "one")
    assert ((tmp_path / "one").read_bytes(), (tmp_path / "one").stat().st_mode & 0o777) == (
        (tree / "run").read_bytes(),
        0o755,
    )
    shared.download("/proc/version", tmp_path / "version")
    assert (tmp_path / "version").read_bytes().startswith(b"Linux")
    for place in (tmp_path / "one", back):
        with pytest.raises(FileExistsError):
            shared.download(f"{TMP}/tree", place)
    with pytest.raises(FileExistsError):
        shared.upload(tree, f"{TMP}/tree")


def test_a_killed_file_server_is_replaced(shared: Sandbox) -> None:
    """If a program kills the file server, which runs as the same user, the next request gets a new one."""
    shared.files.write(f"{TMP}/kept", b"kept")
    shared.shell("for pid in /proc/[0-9]*; do pid=${pid#/proc/}; [ $pid -le 2 -o $pid = $$ ] || kill -9 $pid; done")
    with contextlib.suppress(SandboxError):
        shared.files.read(f"{TMP}/kept")
    assert shared.files.read(f"{TMP}/kept") == b"kept"


# ports

SERVER = """
import socketserver
class Echo(socketserver.StreamRequestHandler):
    def handle(self):
        data = self.rfile.read()
        self.wfile.write(b"%d:" % len(data) + data[-3:])
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
with Server(("127.0.0.1", 8000), Echo) as server:
    print("ready", flush=True)
    server.serve_forever()
"""


def asked(address: tuple[str, int], data: bytes) -> bytes:
    """What a server answers to *data*."""
    family = socket.AF_UNIX if address[1] == 0 else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.settimeout(60)
        connection.connect(address[0] if family is socket.AF_UNIX else address)
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return answer


def test_a_port_of_the_sandbox_is_reached_from_the_host(tmp_path: Path, state: Path) -> None:
    """Connections to a forwarded port reach the server, several at once, and end with the sandbox."""
    path = str(tmp_path / "socket")
    with Sandbox() as opened:
        server = opened.start(["python3", "-c", SERVER])
        assert until(server, b"\n") == b"ready\n"
        tcp, unix, closed = opened.forward(8000), opened.forward(8000, unix=path), opened.forward(9)
        assert (tcp[0], unix, Path(path).stat().st_mode & 0o777) == ("127.0.0.1", (path, 0), 0o600)
        data = os.urandom(1_000_000)
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda address: asked(address, data), [tcp, unix] * 3))
        assert answers == [b"1000000:" + data[-3:]] * 6
        with contextlib.suppress(ConnectionResetError):
            assert asked(closed, b"") == b""
        with pytest.raises(SandboxError, match="1 to 65535"):
            opened.forward(0)
        (tmp_path / "mine").write_text("mine")
        for taken in (path, str(tmp_path / "mine")):
            with pytest.raises(OSError, match="in use"):
                opened.forward(8000, unix=taken)
            assert Path(taken).exists()
        waiting = socket.create_connection(tcp)
    with waiting:
        waiting.settimeout(60)
        with contextlib.suppress(ConnectionResetError):
            assert waiting.recv(1) == b""
    assert not Path(path).exists()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(tcp)
    assert opened.result is not None
    assert len(opened.result.commands) == 1
    assert left_behind(state) == []


# the end


@pytest.mark.usefixtures("state")
def test_connections_leave_room_for_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that never answers takes at most half of the commands, and its connections end once nobody waits."""
    monkeypatch.setattr(forwarding, "_SILENT_S", 1.0)
    with Sandbox() as opened:
        server = opened.start(["python3", "-c", SILENT], detach=False)
        assert until(server, b"here\n") == b"here\n"
        place, _ = opened.forward(8000, unix=str(tmp_path / "port"))
        sockets = [socket.socket(socket.AF_UNIX) for _ in range(80)]
        for one in sockets[:-1]:
            one.connect(place)
        assert opened.exec(["true"]).ok
        assert opened.files.list("/")
        for one in sockets[:-1]:
            one.close()
        deadline = time.monotonic() + 30
        data = b""
        while data != b"hello":  # until a connection has ended
            assert time.monotonic() < deadline
            with socket.socket(socket.AF_UNIX) as last, contextlib.suppress(ConnectionError, TimeoutError):
                last.settimeout(5)
                last.connect(place)
                last.sendall(b"say")
                data = last.recv(5)
        sockets[-1].close()


def test_closing_applies_changes_and_reports_each_command(state: Path, tmp_path: Path) -> None:
    """On closing, changes come out, the result lists each command, and nothing is left on the host."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "old").write_text("old")
    before = len(names(Path("/proc/self/fd")))
    with Sandbox(workdir=work) as opened:
        assert text(opened.exec(["cat", "old"])) == "old"
        opened.shell("echo new > new; rm old")
        opened.exec(["sleep", "9"], timeout_s=0.2)
        opened.start(SLEEPER)
        assert names(work) == ["old"]
    result = opened.result
    assert result is not None
    assert (result.outcome, result.reason_code, result.changes.state) == ("ok", "closed", "applied")
    assert names(work) == ["new"]
    digest = hashlib.sha256(b"cat\0old\0").hexdigest()
    outcomes = [one.outcome for one in result.commands]
    assert outcomes[0] == "ok"
    assert "timeout" in outcomes
    assert result.commands[0].argv_sha256 == f"sha256:{digest}"
    lines = (all_runs() / result.run / "commands.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [one.id for one in result.commands]
    assert json.loads((all_runs() / result.run / "result.json").read_bytes())["commands"]
    assert left_behind(state) == []
    assert len(names(Path("/proc/self/fd"))) <= before
    assert opened.close() is result
    with pytest.raises(SandboxError, match="it was closed") as raised:
        opened.exec(["true"])
    assert raised.value.code == "sandbox-closed"


def test_a_process_may_be_waited_for_after_the_end(tmp_path: Path) -> None:
    """A command that had ended can be waited for after the sandbox was closed, and writes to no other file."""
    with Sandbox() as opened:
        process = opened.start(["echo", "done"])
        while process.poll() is None:
            time.sleep(0.05)
        other = opened.start(["echo", "other"])
        assert opened.shell("sleep 1").ok
    files = [tmp_path / str(number) for number in range(12)]
    with contextlib.ExitStack() as stack:
        for file in files:
            stack.enter_context(file.open("w"))
        assert process.wait().ok
        assert other.wait().ok
    assert [file.read_bytes() for file in files] == [b""] * 12


def test_a_vm_that_is_lost_while_it_closes_is_no_success(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the VM ends before its changes have arrived, the result says that it was lost."""
    opened = Sandbox()
    opened.exec(["true"])
    real = Session.close

    def close(self: Session, *args: Any) -> object:  # noqa: ANN401 - as it is called
        (owner,) = owners(state)
        os.kill(_supervisor(state), signal.SIGKILL)
        while marked(str(owner["instance"])):  # else the guest may still answer in time
            time.sleep(0.01)
        return real(self, *args)

    monkeypatch.setattr(Session, "close", close)
    assert opened.close().outcome == "guest-lost"
    assert left_behind(state) == []


def test_an_exception_keeps_the_changes(state: Path, tmp_path: Path) -> None:
    """If the with block ends by an exception, nothing is applied, and the changes are kept."""
    work = tmp_path / "work"
    work.mkdir()
    with contextlib.suppress(RuntimeError), Sandbox(workdir=work) as opened:
        opened.shell("echo new > new")
        raise RuntimeError
    assert opened.result is not None
    assert opened.result.changes.state == "kept"
    assert names(work) == []
    assert left_behind(state) == []


@pytest.mark.parametrize("open_one", [Sandbox, Sandbox.create])
@pytest.mark.parametrize(
    ("life", "code"), [({"lifetime_s": 5}, "expired"), ({"idle_s": 1.0, "lifetime_s": 60}, "idle")]
)
def test_a_sandbox_ends_by_itself(
    state: Path, tmp_path: Path, life: dict[str, float], code: str, open_one: Callable[..., Sandbox]
) -> None:
    """After its lifetime, or after some idle time, a sandbox ends and keeps its changes; its user gets the reason."""
    work = tmp_path / "work"
    work.mkdir()
    opened = open_one(workdir=work, **life)
    opened.shell("echo new > new")
    process = opened.start(SLEEPER) if code == "expired" else None
    if process is not None:
        with pytest.raises(SandboxError) as raised:
            process.wait(60)
        assert raised.value.code == "sandbox-lost"
    deadline = time.monotonic() + 60
    while opened.alive:
        assert time.monotonic() < deadline
        time.sleep(0.05)  # nothing reports the end but this
    result = opened.close()
    assert (result.outcome, result.reason_code, result.changes.state) == ("timeout", code, "kept")
    assert names(work) == []
    while left := left_behind(state):  # a process that holds a sandbox ends after it
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_a_lifetime_can_be_extended(state: Path) -> None:
    """`extend` counts from now."""
    with Sandbox(lifetime_s=5) as opened:
        opened.extend(60)
        assert text(opened.shell("sleep 6; echo alive")) == "alive\n"
    assert left_behind(state) == []


def _supervisor(state: Path) -> int:
    (owner,) = owners(state)
    pid: int = owner["processes"]["supervisor"]["pid"]  # type: ignore[index]
    return pid


def test_x07_kill_ends_a_sandbox(state: Path) -> None:
    """`x07 kill` ends a sandbox of another process."""
    opened = Sandbox()
    process = opened.start(SLEEPER)
    listed = subprocess.run([*X07, "ps"], check=True, capture_output=True, text=True).stdout
    assert opened.id in listed
    subprocess.run([*X07, "kill", opened.id], check=True, capture_output=True)
    with pytest.raises(SandboxError):
        process.wait(60)
    assert opened.close().outcome == "cancelled"
    assert left_behind(state) == []


KILLED = """
import sys, time
from x07_sandbox import Sandbox
opened = Sandbox()
opened.start(["sleep", "600"])
print(opened.id, flush=True)
time.sleep(600)
"""


def test_a_killed_creator_takes_its_sandbox_along(state: Path) -> None:
    """If the process that opened a sandbox is killed, the VM ends, and a sweep leaves nothing."""
    with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.kill()
    subprocess.run([*X07, "sweep"], check=True, capture_output=True)
    assert left_behind(state) == []


FORGOTTEN = """
import sys
from x07_sandbox import Sandbox
opened = Sandbox(workdir=sys.argv[1])
opened.shell("echo new > new")
print(opened.id)
"""


def test_a_program_that_forgets_its_sandbox_keeps_the_changes(state: Path, tmp_path: Path) -> None:
    """At the normal end of its process, an open sandbox is closed, and its changes are kept."""
    work = tmp_path / "work"
    work.mkdir()
    argv = [sys.executable, "-c", FORGOTTEN, str(work)]
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    assert done.stderr == ""
    result = json.loads((all_runs() / done.stdout.strip() / "result.json").read_bytes())
    assert (result["changes"]["state"], names(work)) == ("kept", [])
    assert left_behind(state) == []


def test_a_block_whose_sandbox_has_ended_raises(state: Path) -> None:
    """If a sandbox has reached its lifetime, the end of its with block is an error."""

    def use() -> None:
        with Sandbox(lifetime_s=0.5) as opened:
            while opened.alive:
                time.sleep(0.05)  # nothing reports the end but this

    with pytest.raises(SandboxError, match="ended before it was closed") as raised:
        use()
    assert raised.value.result.reason_code == "expired"
    assert left_behind(state) == []


def test_the_gate_decides_about_each_connection(state: Path) -> None:
    """With allowed hosts, a sandbox has a gate, and each command lists what it was denied, the result all of it."""
    script = "import socket\ntry: socket.create_connection(('other.example', 443))\nexcept OSError as exc: print(exc)"
    with Sandbox(allow_hosts=["example.org:443"]) as opened:
        for _ in range(2):
            ended = opened.exec(["python3", "-c", script])
            assert "not known" in text(ended)
            assert [(one.field, one.subject, one.count) for one in ended.denials] == [
                ("net.allow_hosts", "other.example", 1)
            ]
        assert opened.exec(["true"]).denials == ()
    assert opened.result is not None
    assert [(one.field, one.subject, one.count) for one in opened.result.denials] == [
        ("net.allow_hosts", "other.example", 2)
    ]
    assert left_behind(state) == []


def test_a_failed_command_has_hints(shared: Sandbox) -> None:
    """A command that fails says what it seems to lack, as a program of its own does."""
    ended = shared.exec(["python3", "-c", "import numpy"])
    assert [(one.subject, one.kind) for one in ended.hints] == [("the Python module numpy", "missing")]


# asyncio


def test_async_sandboxes_have_the_same_methods() -> None:
    """Each public method of the sandbox, its processes and its files has an asyncio twin."""
    from x07_sandbox.library.async_sandbox import AsyncProcess
    from x07_sandbox.library.files import AsyncFiles, Files
    from x07_sandbox.sessions.command import Process

    own = {"again", "wake", "feed", "collect", "kept", "send_all", "next_pieces", "ended", "ending", "until", "tail"}
    for one, twin in ((Sandbox, AsyncSandbox), (Process, AsyncProcess), (Files, AsyncFiles)):
        names = {name for name in vars(one) if not name.startswith("_")} - own
        assert names - set(vars(twin)) == set(), one


def test_async_commands_run_at_once_and_are_cancelled_alone(state: Path) -> None:
    """Commands run at the same time, and a cancelled task kills its command only."""
    seen = asyncio.Event()

    async def use() -> None:
        async with AsyncSandbox() as opened:
            ended = await asyncio.gather(*(opened.exec(["echo", str(number)]) for number in range(4)))
            assert [one.stdout for one in ended] == [b"0\n", b"1\n", b"2\n", b"3\n"]
            task = asyncio.create_task(opened.exec(SLEEPER, on_output=lambda _name, _data: seen.set()))
            await seen.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            process = await opened.start(["cat"])
            reading = asyncio.create_task(process.read())
            await asyncio.sleep(0.2)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            await process.write(b"still here\n")
            assert await process.read() == b"still here\n"
            await process.close_stdin()
            assert [data async for _, data in process] == []
            assert (await process.wait()).ok
            starting = asyncio.create_task(opened.start(SLEEPER))
            await asyncio.sleep(0)  # it has begun
            starting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await starting
            await opened.files.write("a/b", b"1")
            assert await opened.files.read("a/b") == b"1"
            deadline = time.monotonic() + 30
            while (await opened.shell(SLEEPING)).stdout != b"0\n":
                assert time.monotonic() < deadline
        assert opened.result is not None
        assert opened.result.reason_code == "closed"

    asyncio.run(use())
    assert threading.active_count() < 10
    assert left_behind(state) == []


CHURN = """
import os, ctypes, itertools
libc = ctypes.CDLL(None)
os.mkdir("real")
os.symlink("/", "swapped")
for number in itertools.count():
    for name in range(50):
        open(f"t{name}", "w").close()
        os.symlink("t", f"l{name}")
        os.mkdir(f"d{name}")
    libc.renameat2(-100, b"real", -100, b"swapped", 2)
    for name in range(50):
        os.unlink(f"t{name}")
        os.unlink(f"l{name}")
        os.rmdir(f"d{name}")
    if number == 3:
        print("busy", flush=True)
"""
ALL_TERMINALS = """
import os
held = []
try:
    while True:
        held.append(os.open("/dev/ptmx", os.O_RDWR))
except OSError:
    print("all", flush=True)
input()
"""


def test_changes_and_downloads_hold_while_a_program_changes_everything(tmp_path: Path) -> None:
    """While files come and go and a folder is exchanged with a link, changes so far hold nothing from outside."""
    work = tmp_path / "work"
    work.mkdir()
    with Sandbox(workdir=work) as opened:
        process = opened.start(["python3", "-c", CHURN])
        until(process, b"busy\n")
        for number in range(30):
            found = opened.changes()
            assert found.running
            outside = [one.name for one in found.changes.names if one.name.startswith(("real/", "swapped/"))]
            assert outside == []
            if number % 10 == 0:
                opened.download(".", tmp_path / f"copy{number}")
                for name in ("real", "swapped"):
                    copied = tmp_path / f"copy{number}" / name
                    assert copied.is_symlink() or not copied.exists() or list(copied.iterdir()) == []
        process.kill()
        assert text(opened.exec(["echo", "on"])) == "on\n"
        opened.close("discard")


def test_a_sandbox_survives_a_program_that_takes_all_terminals(shared: Sandbox) -> None:
    """Without a free terminal, only the command that wants one fails; ports below 1024 are for programs."""
    process = shared.start(["python3", "-c", ALL_TERMINALS])
    until(process, b"all\n")
    assert shared.start(["sh"], tty=True).wait(60).outcome == "refused"
    process.kill()
    bind = "import socket; socket.socket().bind(('127.0.0.1', 80)); print('80')"
    assert text(shared.exec(["python3", "-c", bind])) == "80\n"


def test_discarded_changes_are_no_violation(tmp_path: Path) -> None:
    """A sandbox with changes to a folder that are not wanted ends well."""
    work = tmp_path / "work"
    work.mkdir()
    with Sandbox(workdir=work) as opened:
        opened.files.write("new", b"1")
        result = opened.close("discard")
    assert (result.outcome, result.changes.state, names(work)) == ("ok", "discarded", [])


def test_output_is_read_until_a_mark(shared: Sandbox) -> None:
    """A caller reads lines of a live process; what came after them, or before a timeout, is not lost."""
    process = shared.start(["cat"])
    process.write(b"one\ntwo\npart")
    assert process.read_until(b"\n") == b"one\n"
    assert process.read_until(b"o\n", timeout_s=60) == b"two\n"
    with pytest.raises(TimeoutError):
        process.read_until(b"\n", timeout_s=0.3)
    process.write(b"ial\n" + b"x" * 10 + b"end of all")
    assert process.read_until(b"\n") == b"partial\n"
    assert process.read_until(b"end", max_bytes=12) == b"x" * 10 + b"en"
    assert process.read_until(b"d") == b"d"
    process.close_stdin()
    assert process.read_until(b"\n") == b" of all"
    assert process.read_until(b"\n") == b""
    assert process.wait().ok
    with pytest.raises(SandboxError, match="end is b''"):
        process.read_until(b"")


def test_a_mark_may_arrive_in_two_pieces(shared: Sandbox) -> None:
    """A mark of which the program writes one half later is found, and nothing after it is returned."""
    process = shared.start(["sh", "-c", "printf 'aa\\r'; read x; printf '\\nbb'; read x"])
    with pytest.raises(TimeoutError):
        process.read_until(b"\r\n", timeout_s=0.3)
    process.write(b"\n")
    assert process.read_until(b"\r\n", timeout_s=60) == b"aa\r\n"
    process.kill()
    assert process.wait().stdout == b"bb"


def test_a_port_is_waited_for(shared: Sandbox) -> None:
    """A caller waits until a server listens, and gets TimeoutError if none does."""
    with pytest.raises(TimeoutError, match=r"at port 8123 within 0\.2 s"):
        shared.wait_for_port(8123, 0.2)
    server = "import socket, time; time.sleep(0.4); s = socket.create_server(('127.0.0.1', 8123)); time.sleep(600)"
    process = shared.start(["python3", "-c", server])
    shared.wait_for_port(8123, timeout_s=60)
    assert process.poll() is None
    shared.wait_for_port(8123, 0.2)
    process.kill()
    process.wait()
    with pytest.raises(SandboxError, match="from 1 to 65535"):
        shared.wait_for_port(0)
    with pytest.raises(SandboxError, match="timeout_s"):
        shared.wait_for_port(80, -1)
