"""The gate and resolver processes: their confinement, and how they end."""

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
from x07_sandbox.channel.egress import Target
from x07_sandbox.channel.streams import Role, Streams
from x07_sandbox.host.waiting import wait_readable
from x07_sandbox.network.processes import GateConfig, GateProcess, gate_running
from x07_sandbox.network.rules import NetSettings
from x07_sandbox.policy.decode import default_policy, render_policy

if TYPE_CHECKING:
    from collections.abc import Iterator


CONFIG: Final = GateConfig(policy=render_policy(default_policy()), denied={}, settings=NetSettings())
WAIT_S: Final = 20.0


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[GateProcess]:
    """A gate with the built-in policy, without a guest."""
    log_fd = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with gate_running(CONFIG, log_fd) as made:
            yield made
    finally:
        os.close(log_fd)


def status_of(pid: int) -> dict[str, str]:
    """Return the kernel's status of a process."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def confined_status_of(pid: int) -> dict[str, str]:
    """Return the status after the process has confined itself, or the last one seen if it never does."""
    deadline = time.monotonic() + WAIT_S
    while status_of(pid)["Seccomp"] != "2" and time.monotonic() < deadline:
        time.sleep(0.01)  # no event announces it
    return status_of(pid)


def guest_of(gate: GateProcess) -> socket.socket:
    """Return the guest's end of a stream that the gate was given."""
    ours, theirs = socket.socketpair()
    gate.send_stream(theirs.fileno())
    theirs.close()
    ours.settimeout(WAIT_S)
    return ours


def helpers() -> list[int]:
    """Return gate and resolver, which are children of our launcher thread, once both are executed."""
    deadline = time.monotonic() + WAIT_S
    while True:
        children = [path.read_text(encoding="ascii").split() for path in Path("/proc/self/task").glob("*/children")]
        pids = [int(word) for words in children for word in words]
        found = [pid for pid in pids if b"x07_sandbox.network" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        if len(found) == 2 or time.monotonic() > deadline:
            return found
        time.sleep(0.01)  # no event announces it


def ask(guest: socket.socket, host: bytes, port: int) -> int:
    """Return the gate's answer to a guest's request for a connection."""
    link = Streams(Role.GUEST, egress.STREAMS)
    link.open(egress.TCP, Target(egress.TCP, host, port).opening())
    guest.sendall(link.data_to_send())
    (event,) = link.receive(guest.recv(4096))
    return event.code


def test_gate_and_resolver_have_no_rights(gate: GateProcess) -> None:
    """Gate and resolver run under seccomp, without capabilities; started by root, with their own uid and no group."""
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


def test_a_gate_answers_and_reports(gate: GateProcess) -> None:
    """A gate decides on a guest's requests, and reports them when it is stopped."""
    with guest_of(gate) as guest:
        assert ask(guest, b"example.org", 443) == egress.POLICY
    account = gate.account()
    assert account is not None
    assert [(row.host, row.port, row.rule) for row in account.denied] == [("example.org", 443, "net.allow_hosts")]


def test_a_gate_reports_while_it_runs(gate: GateProcess) -> None:
    """A gate counts what the guest has sent until the question, also what it had not read yet, and goes on."""
    account = None
    with guest_of(gate) as guest:
        for number in range(1, 4):
            link = Streams(Role.GUEST, egress.STREAMS)
            if number == 1:
                assert ask(guest, b"example.org", 443) == egress.POLICY
            else:
                link.message(egress.REFUSAL, Target(egress.TCP, b"example.org", 443).refusal())
                guest.sendall(link.data_to_send())
            account = gate.account_so_far()
            assert account is not None
            assert [row.count for row in account.denied] == [number]
    assert gate.account() == account
    assert gate.account_so_far() is None


def test_the_gate_is_the_only_holder_of_the_stream(gate: GateProcess) -> None:
    """Only the gate holds the guest's stream: when the gate ends, the stream ends."""
    with guest_of(gate) as guest:
        assert ask(guest, b"example.org", 443) == egress.POLICY
        gate.end()
        assert guest.recv(1) == b""


@pytest.mark.parametrize("which", ["gate", "resolver"])
def test_killing_gate_or_resolver_loses_the_report(gate: GateProcess, which: str) -> None:
    """Killing gate or resolver ends the gate without a report, and the run ends as gate-lost."""
    with guest_of(gate) as guest:
        assert ask(guest, b"example.org", 443) == egress.POLICY
        named = f"network.{which} import"
        (pid,) = [pid for pid in helpers() if named.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(pid, signal.SIGKILL)
        assert wait_readable(gate.pidfd, WAIT_S)
        assert guest.recv(1) == b""
    assert gate.account() is None


def test_gate_and_resolver_end_with_their_runner(tmp_path: Path) -> None:
    """Gate and resolver end when the process that started them is killed."""
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
