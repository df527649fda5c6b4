"""Forks of sandboxes with connections: those of a fork end, those of its parent go on, and each has its own gate."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.lab.laboratory import Laboratory

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("image", "state")]

# Run in the laboratory: a program with a connection, which floods it, and what becomes of both in forks.
DRIVER: Final = """
import json, sys
import msgspec
from x07_sandbox import Sandbox
PROGRAM = '''
import socket, sys, threading
hosts = ("web.lab.example", 7)
first = socket.create_connection(hosts, timeout=60)
flood = socket.create_connection(hosts, timeout=60)
def pump():
    try:
        while True:
            flood.sendall(bytes(65536))
    except OSError:
        pass
def drain():
    try:
        while flood.recv(65536):
            pass
    except OSError:
        pass
for work in (pump, drain):
    threading.Thread(target=work, daemon=True).start()
def echo(sock):
    try:
        sock.sendall(b"word")
        got = b""
        while len(got) < 4:
            more = sock.recv(4 - len(got))
            if not more:
                return "closed"
            got += more
        return got.decode()
    except OSError as exc:
        return type(exc).__name__
for line in sys.stdin:
    try:
        with socket.create_connection(hosts, timeout=60) as new:
            said = echo(new)
    except OSError as exc:
        said = exc.strerror
    print(echo(first), said, flush=True)
'''
def ask(sandbox, number):
    process = sandbox.process(number)
    process.write(b"\\n")
    return process.read_until(b"\\n", timeout_s=60).decode().strip()
said = {}
with Sandbox(allow_hosts=["web.lab.example:7"]) as parent:
    number = parent.start(["python3", "-u", "-c", PROGRAM]).id
    said["before"] = ask(parent, number)
    forks = parent.fork(3)
    said["forks"] = [ask(one, number) for one in forks]
    said["parent"] = ask(parent, number)
    (again,) = forks[0].fork()
    said["fork of a fork"], said["again"] = ask(again, number), ask(forks[0], number)
    denied = forks[1].exec(["python3", "-c", "import socket; socket.create_connection(('web.lab.example', 81))"])
    said["denied"] = [one.subject for one in denied.denials]
    point = forks[2].checkpoint()
    said["kept"] = ask(forks[2], number)
    forks[2].rollback(point)
    said["rolled back"] = ask(forks[2], number)
    results = [one.close() for one in (again, *forks, parent)]
counts = [sum(row.count for row in one.net.allowed) for one in results]
print(json.dumps([said, counts, [one.reason_code for one in results], [len(one.net.denied) for one in results]]))
"""


def test_the_connections_of_a_fork_end_and_those_of_its_parent_go_on(lab: Laboratory, tmp_path: Path) -> None:
    """In forks, also while data floods in both directions, old connections end, and new ones are the fork's own."""
    lab.reset_names()
    (tmp_path / "x07").mkdir()
    (tmp_path / "x07" / "sandbox.toml").write_text("[net]\nopaque_ports = [7]\n")
    done = lab.run(["env", f"XDG_CONFIG_HOME={tmp_path}", sys.executable, "-c", DRIVER], timeout_s=240)
    assert not done.returncode, done.stderr.decode()
    said, counts, reasons, denied = json.loads(done.stdout)
    good, ended = "word word", {"ConnectionResetError word", "BrokenPipeError word", "closed word"}
    assert said["before"] == said["parent"] == good
    assert {*said["forks"], said["fork of a fork"], said["rolled back"]} <= ended
    assert said["again"] in ended  # it has had no older connection since its own start
    assert said["denied"] == ["web.lab.example:81"]
    assert reasons == ["closed"] * 5
    assert counts == [1, 2, 1, 3, 4]
    assert denied == [0, 0, 1, 0, 0]
