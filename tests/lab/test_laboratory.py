"""The laboratory itself: its log holds what no attack may cause, and it leaves no remains."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.laboratory import SITE, Laboratory, leftovers, remove_dead
from x07_sandbox.host.processes import identify, wait_gone

pytestmark = [pytest.mark.network, pytest.mark.root]

ROOT = Path(__file__).resolve().parents[2]
TALK = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), 5) as client:
    client.sendall(b"probe")
    print(client.recv(100))
"""


@pytest.mark.parametrize(
    ("host", "port", "answer"),
    [
        ("169.254.169.254", 2222, r"b'SSH-2.0-lab\r\n'"),
        ("127.0.0.1", 8600, r"b'host secret\r\n'"),
        ("45.45.45.1", 8600, r"b'host secret\r\n'"),
    ],
)
def test_a_server_that_no_attack_may_reach_logs_its_contacts(
    lab: Laboratory, host: str, port: int, answer: str
) -> None:
    """The servers of the host and of the metadata service log each connection and the bytes that they received."""
    mark = lab.mark()
    assert lab.python(TALK, host, str(port)).strip() == answer
    lab.wait_quiet()
    found = [(contact.where, contact.event, contact.data) for contact in lab.contacts(mark)]
    assert found == [(f"{host}:{port}", "connect", ""), (f"{host}:{port}", "bytes", "probe")]


def test_packets_to_unused_addresses_are_listed(lab: Laboratory) -> None:
    """Packets to closed ports and to unused addresses are listed as packets, not as contacts."""
    mark = lab.mark()
    code = """
import socket
for host, port in (("46.46.46.46", 81), ("8.8.8.8", 443)):
    try:
        socket.create_connection((host, port), 0.2)
    except OSError as error:
        print(type(error).__name__)
socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("1.1.1.1", 53))
"""
    refused, nobody = lab.python(code).split()
    # A slow machine may know unused addresses as unreachable by then.
    assert (refused, nobody in {"TimeoutError", "OSError"}) == ("ConnectionRefusedError", True)
    lab.wait_quiet()
    assert lab.contacts(mark) == []
    assert {(found.where, found.proto, found.data) for found in lab.packets(mark)} == {
        (f"{SITE}:81", "tcp", ""),
        ("8.8.8.8:443", "tcp", ""),
        ("1.1.1.1:53", "udp", "x"),
    }


def test_the_gate_keeps_the_control_groups_of_the_host(lab: Laboratory) -> None:
    """A command in the laboratory sees the host's control groups, so a sandbox started there has its limits."""
    listed = lab.run(["ls", "/sys/fs/cgroup"]).stdout.decode().split()
    assert listed == sorted(listed)
    assert set(listed) == set(os.listdir("/sys/fs/cgroup"))  # noqa: PTH208 names


def test_a_laboratory_leaves_no_remains(lab: Laboratory) -> None:
    """A laboratory removes its namespaces, files and processes when it ends, including running clients."""
    with Laboratory() as other:
        assert {lab.name, other.name} <= leftovers()
        client = subprocess.Popen([*other.gate_prefix, "sleep", "600"])
        servers = [server.pid for server in other._servers]  # noqa: SLF001 the test of its own parts
        other.mark()
    assert client.wait(60) == -signal.SIGKILL
    assert other.name not in leftovers()
    assert not any(Path(f"/proc/{pid}").exists() for pid in servers)
    assert lab.name in leftovers()


def test_the_next_laboratory_removes_the_remains_of_a_killed_one(lab: Laboratory) -> None:
    """The next laboratory removes the remains and processes of one whose process was killed."""
    code = (
        "import json, signal, os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.lab.laboratory import Laboratory\n"
        "lab = Laboratory().__enter__()\n"
        "print(json.dumps([lab.name, [server.pid for server in lab._servers]]), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    name, pids = json.loads(done.stdout)
    assert name in leftovers()
    remove_dead()
    assert name not in leftovers()
    assert lab.name in leftovers()
    still = [identity for pid in pids if (identity := identify(pid)) is not None]
    assert all(wait_gone(identity, 5) for identity in still)
