"""The behaviours of a sandbox with several commands."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Final

from x07_sandbox.channel.files import Request
from x07_sandbox.channel.link import COMMANDS_MAX
from x07_sandbox.channel.trees import Entry, Kind
from x07_sandbox.conformance.box import ROOT, Box, forked, opened
from x07_sandbox.conformance.harness import Bench, BrokenError, Facts, expect, fact, remaining
from x07_sandbox.errors import UsageError
from x07_sandbox.files.incoming import Incoming
from x07_sandbox.host import settings
from x07_sandbox.host.processes import has_mark
from x07_sandbox.sessions.transfers import memory_file

if TYPE_CHECKING:
    from x07_sandbox.sessions.files import FileServer

_AT_ONCE: Final = 3
_EACH_WAY: Final = 10 * settings.MIB
IN_A_ROW: Final = 1000
_WARM_UP: Final = 20  # commands, after which the agent has loaded and allocated all that it needs
_LOADS: Final = ("the number of descriptors", "the number of tasks", "the memory in KiB")
_MORE_OF_KERNEL: Final = 20  # its threads and its count of files vary; one for each command would be more
_MORE_KIB: Final = 2048  # memory that may be allocated in another way, but not 2 KiB for each command
_SERVER: Final = """
import os, socket, sys
with socket.create_server(("127.0.0.1", 0)) as server:
    with open("new", "w") as file: file.write(str(server.getsockname()[1]))
    os.rename("new", "port")
    while True:
        with server.accept()[0] as client:
            while data := client.recv(65536): client.sendall(data.upper())
"""
_CLIENT: Final = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(open("port").read()))) as client:
    client.sendall(b"hello")
    client.shutdown(socket.SHUT_WR)
    print(client.recv(10).decode())
"""
_LEAVE_TREE: Final = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(1000)
    os._exit(0)
os.wait()
print("up", flush=True)
time.sleep(1000)
"""
_FORK: Final = """
import os, signal, sys, time
count = 0
try:
    while count < int(sys.argv[1]):
        if os.fork() == 0: signal.pause()
        count += 1
except OSError: pass
print(count, flush=True)
time.sleep(1000)
"""
_HOLD: Final = """
import sys, time
held = bytearray(int(sys.argv[1]))
held[::4096] = bytes(len(held[::4096])).replace(b"\\0", b"x")
print("up", flush=True)
time.sleep(1000)
"""


def _at_once(bench: Bench) -> None:
    with opened(bench) as box:
        commands = [box.start("cat", stdin=None) for _ in range(_AT_ONCE)]
        box.started(*commands)
        sent = [bytes([65 + number]) * _EACH_WAY for number in range(_AT_ONCE)]
        for command, data in zip(commands, sent, strict=True):
            command.execution.write(data)
            command.execution.end_input()
        found = [(box.code(command), command.output.sha256()) for command in commands]
        expect("exit codes and outputs", [(0, hashlib.sha256(data).hexdigest()) for data in sent], found)


def served(bench: Bench) -> Facts:
    """Leave a server in the background, reach it, and close the sandbox while another command runs."""
    mark = secrets.token_hex(16)
    leave = 'python3 -c "$1" "$2" < /dev/null > /dev/null 2>&1 & while ! test -s port; do sleep 0.05; done; cat port'
    with opened(bench) as box:
        port = box.output(box.sh(leave, _SERVER, mark))
        said = box.output(box.python(_CLIENT)).strip()
        data = b"word " * 200_000
        stream = box.output(box.start(port, service="connect", stdin=data))
        running = box.sh("echo up; sleep 1000; : $1", mark)
        box.says(running, "up")
        closed = box.close()
        return {
            "a later command": said,
            "a stream from outside": stream == data.decode().upper(),
            "closed": closed is not None,
            "the running command": running.code,
            "processes left": remaining(mark),  # on a shared kernel, where the agent still runs
        }


def _timed_out(bench: Bench) -> None:
    mark = secrets.token_hex(16)
    with opened(bench) as box:
        other = box.start("cat", stdin=None)
        box.started(other)
        text = "sh -c 'sleep 1000; : $0' $1 & (sleep 1000; : $1) & sh -c 'sleep 1000; : $0' $1 & wait"
        late = box.sh(text, mark, wall_ms=700)
        expect("end of the command", -signal.SIGKILL, box.code(late))
        expect("evidence", expected=True, found=box.session.facts(late.execution).evidence.deadline_passed)
        expect("processes of the command", 0, box.marked(mark))
        other.execution.write(b"still here")
        other.execution.end_input()
        expect("output of the other command", "still here", box.output(other))


def _signalled(bench: Bench) -> None:
    with opened(bench) as box:
        command = box.sh("trap 'echo heard; exit 5' TERM; echo ready; while :; do sleep 0.05; done")
        box.says(command, "ready")
        box.session.stop(command.execution, signal.SIGTERM)
        expect("exit code and output", (5, "ready\nheard\n"), (box.code(command), command.text))


def _whole(bench: Bench) -> None:
    mark = secrets.token_hex(16)
    with opened(bench) as box:
        command = box.python(_LEAVE_TREE, mark)
        box.says(command, "up")
        box.session.stop(command.execution)
        expect("end of the command", -signal.SIGKILL, box.code(command))
        expect("processes of the command", 0, box.marked(mark))


def asked(bench: Bench) -> Facts:
    """Make requests to the file server, most of which fail."""
    secret = bench.folder / "secret-file"
    secret.write_text("secret", encoding="ascii")
    with opened(bench) as box:
        here = box.output(box.sh("mkdir d; ln -s loop loop; echo closed > closed; chmod 0 closed; pwd")).strip()
        files = box.files()

        def error(kind: str, name: str) -> str:
            content = b"one two" if kind == "write" else b""
            found = files.ask(Request(kind, f"{here}/{name}", size=len(content)), [content])
            return errno.errorcode.get(found.errno, "ok")

        written = error("write", "file")
        read = files.ask(Request("read", f"{here}/file", offset=4, size=3))
        content = files.content(read.size)
        listed = sorted(info.name for info in files.ask(Request("list", here)).entries)
        seen = box.output(box.sh("cat file"))
        wanted = [("read", "missing"), ("read", "loop"), ("read", "d"), ("write", "d"), ("read", "file/below")]
        return {
            "written, read, listed, seen": (written, content, listed, seen),
            "errors": [error(*request) for request in wanted],
            "closed": error("read", "closed"),
            "ways out": _ways_out(box, files, here, secret),
        }


def _ways_out(box: Box, files: FileServer, here: str, secret: Path) -> list[str]:
    """Return what was read from outside: by a path, by links, and by a link that changes with a folder meanwhile."""
    outside = [str(secret), "/proc/1/environ", "/proc/1/root/etc/shadow", f"/proc/1/root{secret}", "/dev/mem"]
    paths = [*outside, *(f"{here}/../../../../../../..{path}" for path in outside)]
    for number, path in enumerate(outside):
        box.output(box.sh('ln -s "$1" "$2"', path, f"link{number}"))
        paths.append(f"{here}/link{number}")
    found = [path for path in paths if _read(files, path)]
    swap = (
        'mkdir a; echo inside > "a/$2"; ln -s "$1" b; echo up; while :; do mv a c; mv -T b a; mv -T a b; mv c a; done'
    )
    command = box.sh(swap, str(secret.parent), secret.name)
    box.says(command, "up")
    read = {_read(files, f"{here}/a/{secret.name}") for _ in range(200)}
    box.session.stop(command.execution)
    return [*found, *sorted(f"{content!r} by a swapped link" for content in read - {b"", b"inside\n"})]


def _read(files: FileServer, path: str) -> bytes:
    return files.content(files.ask(Request("read", path, size=100)).size)


def _load(box: Box, bench: Bench) -> tuple[int, int, int]:
    """Return the numbers of open descriptors and tasks, and the memory in KiB, that the sandbox uses without commands.

    A kernel of its own counts them itself. On this kernel the processes with the job's mark are the agent's.
    """
    if bench.features.own_kernel:
        text = box.output(box.sh("cat /proc/sys/fs/file-nr /proc/loadavg /proc/meminfo"))
        files, load, *lines = text.splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        used = sizes["MemTotal"] - sizes["MemAvailable"]
        return int(files.split()[0]), int(load.split()[3].partition("/")[2]), used
    fds = tasks = memory = 0
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or not has_mark(int(entry.name), box.instance.record.mark):
            continue
        with contextlib.suppress(OSError):
            fds += len(os.listdir(f"{entry.path}/fd"))  # noqa: PTH208 - names are enough
            tasks += len(os.listdir(f"{entry.path}/task"))  # noqa: PTH208 - as above
            with open(f"{entry.path}/statm", encoding="ascii") as file:  # noqa: PTH123 - as above
                memory += int(file.read().split()[1]) * 4
    return fds, tasks, memory


def _in_a_row(bench: Bench) -> None:
    with opened(bench) as box:
        before = _run_in_a_row(box, bench, _WARM_UP)
        after = _run_in_a_row(box, bench, IN_A_ROW)
        vary = _MORE_OF_KERNEL if bench.features.own_kernel else 0
        for what, first, last, more in zip(_LOADS, before, after, (vary, vary, _MORE_KIB), strict=True):
            if last > first + more:
                raise BrokenError(f"{what} grew from {first} to {last}")


def _run_in_a_row(box: Box, bench: Bench, count: int) -> tuple[int, int, int]:
    for number in range(count):
        expect("exit code", number % 7, box.code(box.sh(f"exit {number % 7}")))
    return _load(box, bench)


def _changed(bench: Bench) -> None:
    folder = Entry(Kind.FOLDER, b"", mode=0o777, mtime_ns=10**18)
    tree = b"".join(entry.encoded() for entry in (folder, Entry(Kind.END, b"")))
    found = []
    with contextlib.ExitStack() as stack:

        def incoming() -> Incoming:
            return Incoming(memory_file(b"", stack), roots=1, most_entries=100, most_bytes=settings.MIB)

        box = stack.enter_context(opened(bench, tree))
        for name in ("one", "two"):
            box.output(box.sh(f'echo {name} > "$1"', f"{ROOT}/{name}"))
            current = incoming()
            arrival = box.session.changes(current)
            box.until("changes", lambda arrival=arrival: arrival.ended)  # type: ignore[misc]
            found.append(current)
        running = box.sh('echo three > "$1"; echo up; sleep 1000', f"{ROOT}/three")
        box.says(running, "up")
        found.append(incoming())
        box.close(found[-1])
    names = [(one.complete, sorted(entry.name for entry in one.reported if entry.name)) for one in found]
    all_names = ["one", "two", "three"]
    expect("changes", [(True, sorted(all_names[: number + 1])) for number in range(len(all_names))], names)


def _too_many(bench: Bench) -> None:
    with opened(bench) as box:
        commands = [box.start("cat", stdin=None) for _ in range(COMMANDS_MAX)]
        box.started(*commands)
        try:
            box.start("cat")
        except UsageError as exc:
            expect("refusal", expected=True, found=str(COMMANDS_MAX) in exc.why)
        else:
            raise BrokenError("expected a refusal of one more command, got none")
        for command in commands:
            command.execution.end_input()
        expect("exit codes", {0}, {box.code(command) for command in commands})
        expect("a command afterwards", "again", box.output(box.sh("echo -n again")))


def _tasks_together(bench: Bench) -> None:
    with opened(bench, tasks=8) as box:
        first = box.python(_FORK, "3")
        box.says(first, "\n")
        second = box.python(_FORK, "100")
        box.says(second, "\n")
        expect("children of both", ["3\n", "3\n"], [first.text, second.text])
        for command in (first, second):
            box.session.stop(command.execution)
            box.code(command)
        expect("a command afterwards", "again", box.output(box.sh("echo -n again")))


def _memory_together(bench: Bench) -> None:
    size = 125 * settings.MIB  # two are too large even where the limit includes the agent
    with opened(bench, mem_bytes=144 * settings.MIB) as box:
        first = box.python(_HOLD, str(size))
        box.says(first, "up")
        second = box.python(_HOLD, str(size))
        both = first, second
        box.until("the end of one", lambda: any(one.execution.ended for one in both))
        killed = [one for one in both if one.execution.ended]
        expect("ends", [(-signal.SIGKILL, True)], [(one.code, one.exited.oom_kills > 0) for one in killed])
        expect("a command afterwards", "again", box.output(box.sh("echo -n again")))


def _root_inside(bench: Bench) -> None:
    text = "id -u; echo new > /etc/new; chown 33 /etc/new; stat -c %u /etc/new; kill -9 1 2> /dev/null || echo no"
    with opened(bench, guest_root=True) as box:
        expect("output of root", "0\n33\nno\n", box.output(box.sh(text)))
    with opened(bench) as box:
        expect("output of another sandbox", "no\n", box.output(box.sh("test -e /etc/new || echo no")))


def _forked(bench: Bench) -> None:
    with opened(bench) as box:
        command = box.sh("n=41; while read -r line; do n=$((n + 1)); echo $n $(cat /etc/machine-id); done", stdin=None)
        box.started(command)
        with forked(bench, box, command) as (fork, same):
            ids = []
            for one, its in ((box, command), (fork, same)):
                its.execution.write(b"\n")
                one.says(its, "\n")
                ids.append(its.text.split()[1:])
                expect("the program's variable", "42", its.text.split()[0])
            expect("whether the machine ids differ", True, ids[0] != ids[1])  # noqa: FBT003 - as `expect` has it
            expect("output of a command in the fork", "again", fork.output(fork.sh("echo -n again")))
        expect("output of a command afterwards", "again", box.output(box.sh("echo -n again")))


def _own_cpu(bench: Bench) -> None:
    with opened(bench) as box:
        idle = box.start("cat", stdin=None, cpu_ms=1000)
        box.started(idle)
        busy = [box.sh("while :; do :; done", cpu_ms=1000) for _ in range(2)]
        ends = [(box.code(one), one.exited.cpu_exceeded) for one in busy]
        expect("ends of the busy commands", [(-signal.SIGKILL, True)] * 2, ends)
        idle.execution.end_input()
        expect("end of the idle command", (0, False), (box.code(idle), idle.exited.cpu_exceeded))


FORK: Final = "fork"
SEEN: Final = ("ok", b"two", ["closed", "d", "file", "loop"], "one two")
ERRORS: Final = ["ENOENT", "ELOOP", "EISDIR", "EISDIR", "ENOTDIR"]
ROWS: Final = (
    ("commands-at-once", "Three commands run at once, each with 10 MiB of input and of output.", _at_once),
    ("background-server", "A later command reaches a server that an earlier one left in the background.",
        fact(served, "a later command", "HELLO")),
    ("port-stream", "A stream from outside reaches a port of the sandbox.", fact(served, "a stream from outside")),
    ("close-ends-commands", "Closing a sandbox ends the commands that run.",
        fact(served, "the running command", -signal.SIGKILL)),
    ("close-ends-all", "Closing a sandbox leaves no process of its commands.", fact(served, "processes left", [])),
    ("timeout-of-one", "A command is killed with its children at its deadline. Another one goes on.", _timed_out),
    ("whole-command", "A command is killed with processes that have left its process tree.", _whole),
    ("signal-of-one", "A signal reaches the process of a command, which may handle it.", _signalled),
    ("file-requests", "Files are written, read in part and listed from outside.",
        fact(asked, "written, read, listed, seen", SEEN)),
    ("file-errors", "A file request fails with the error of the kernel.", fact(asked, "errors", ERRORS)),
    ("file-permissions", "A file request fails if the program's user may not open the file.",
        fact(asked, "closed", "EACCES")),
    ("file-root", "A file request reaches nothing outside, also not by a link that is swapped.",
        fact(asked, "ways out", [])),
    ("changes-so-far", "Changes of a write root are sent whenever they are asked for, and at the end.", _changed),
    ("commands-in-a-row", "A thousand commands in a row leave no descriptor, task or memory behind.", _in_a_row),
    ("too-many-commands", "A 65th command at once is refused. The others go on.", _too_many),
    ("tasks-together", "All commands together have no more tasks than the sandbox may have.", _tasks_together),
    ("memory-together", "If all commands together exceed the memory of the sandbox, one is killed. Others go on.",
        _memory_together),
    ("root-inside", "Root inside changes its own system, but neither that of another sandbox nor the agent.",
        _root_inside),
    (FORK, "A fork of a sandbox has its files and programs, and another machine id. The sandbox goes on.", _forked),
    ("cpu-of-one", "A command is not killed for the CPU time of another.", _own_cpu),
)  # fmt: skip
