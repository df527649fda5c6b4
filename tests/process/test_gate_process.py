"""The processes of gate and resolver: what holds them, and how they end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from x07_sandbox.channel import egress
from x07_sandbox.channel.egress import EgressLink
from x07_sandbox.host.poll import wait_readable
from x07_sandbox.network.processes import GateConfig, GateProcess, gate_running
from x07_sandbox.network.rules import NetSettings
from x07_sandbox.policy.default import default_policy, render_policy

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.timeout(60)]

CONFIG: Final = GateConfig(policy=render_policy(default_policy()), denied={}, settings=NetSettings())
WAIT_S: Final = 20.0


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[GateProcess]:
    """A gate of the built-in policy, without a guest."""
    log_fd = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with gate_running(CONFIG, log_fd) as made:
            yield made
    finally:
        os.close(log_fd)


def status_of(pid: int) -> dict[str, str]:
    """The kernel's word on a process."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def confined_status_of(pid: int) -> dict[str, str]:
    """The same once it has confined itself, which it does before it reads anything; as it is if it never does."""
    deadline = time.monotonic() + WAIT_S
    while status_of(pid)["Seccomp"] != "2" and time.monotonic() < deadline:
        time.sleep(0.01)  # it tells nobody
    return status_of(pid)


def guest_of(gate: GateProcess) -> socket.socket:
    """The guest's end of a stream that the gate was given."""
    ours, theirs = socket.socketpair()
    gate.send_stream(theirs.fileno())
    theirs.close()
    ours.settimeout(WAIT_S)
    return ours


def helpers() -> list[int]:
    """Gate and resolver, which are children of our launcher thread."""
    children = [path.read_text(encoding="ascii").split() for path in Path("/proc/self/task").glob("*/children")]
    pids = [int(word) for words in children for word in words]
    return [pid for pid in pids if b"x07_sandbox.network" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def ask(guest: socket.socket, host: bytes, port: int) -> int:
    """The gate's answer to a connection that a guest asks for."""
    link = EgressLink(guest=True)
    link.open(egress.TCP, host, port)
    guest.sendall(link.data_to_send())
    (event,) = link.receive(guest.recv(4096))
    return event.value


def test_gate_and_resolver_have_no_rights(gate: GateProcess) -> None:
    """Both are under seccomp, without capabilities or a way to gain any; root's have their own uid and no group."""
    with guest_of(gate):
        pids = helpers()
        assert len(pids) == 2
        for pid in pids:
            status = confined_status_of(pid)
            assert {status[name] for name in ("CapPrm", "CapInh", "CapAmb")} == {"0" * 16}
            assert (status["CapEff"], status["NoNewPrivs"], status["Seccomp"]) == ("0" * 16, "1", "2")
            if os.geteuid() == 0:
                assert (status["CapBnd"], status["Groups"]) == ("0" * 16, "")
                assert int(status["Uid"].split()[0]) > 60_000
    assert {"no capabilities", "no new privileges", "seccomp"} <= set(gate.walls)


def test_a_gate_answers_and_gives_an_account(gate: GateProcess) -> None:
    """A gate decides about what a guest asks for, and when it is ended it says what it saw."""
    with guest_of(gate) as guest:
        assert ask(guest, b"example.org", 443) == egress.POLICY
    account = gate.account()
    assert account is not None
    assert [(row.host, row.port, row.rule) for row in account.denied] == [("example.org", 443, "net.allow_hosts")]


def test_the_gate_is_the_only_holder_of_the_stream(gate: GateProcess) -> None:
    """Once the gate has the stream from the guest, its end is the stream's end: nobody else keeps it open."""
    with guest_of(gate) as guest:
        assert ask(guest, b"example.org", 443) == egress.POLICY
        gate.end()
        assert guest.recv(1) == b""


@pytest.mark.parametrize("which", ["gate", "resolver"])
def test_a_gate_without_its_resolver_ends_and_has_no_account(gate: GateProcess, which: str) -> None:
    """Killing gate or resolver ends the gate, and there is no account: a run ends as gate-lost."""
    with guest_of(gate) as guest:
        assert ask(guest, b"example.org", 443) == egress.POLICY
        named = "gate_process" if which == "gate" else "resolver_process"
        (pid,) = [pid for pid in helpers() if named.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(pid, signal.SIGKILL)
        assert wait_readable(gate.pidfd, WAIT_S)
        assert guest.recv(1) == b""
    assert gate.account() is None


def test_a_guest_that_breaks_the_protocol_loses_its_stream_only(gate: GateProcess) -> None:
    """A frame that nobody may send ends the stream; the gate goes on, and its account says so."""
    with guest_of(gate) as guest:
        guest.sendall(b"\xff" * 64)
        assert guest.recv(1) == b""
    account = gate.account()
    assert account is not None
    assert [row.rule for row in account.denied] == ["frames"]


def test_gate_and_resolver_end_with_their_runner(tmp_path: Path) -> None:
    """After a SIGKILL of the process that started them, neither gate nor resolver lives on."""
    code = (
        "import os, sys, time\n"
        "from tests.process.test_gate_process import CONFIG, gate_running, guest_of, helpers\n"
        "with gate_running(CONFIG, os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)) as gate:\n"
        "    guest = guest_of(gate)\n"
        "    print(*helpers(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "log")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as runner:
        assert runner.stdout is not None
        pidfds = [os.pidfd_open(int(word)) for word in runner.stdout.readline().split()]
        runner.kill()
    try:
        deadline = time.monotonic() + WAIT_S
        assert len(pidfds) == 2
        assert all(wait_readable(pidfd, deadline - time.monotonic()) for pidfd in pidfds)
    finally:
        for pidfd in pidfds:
            os.close(pidfd)
