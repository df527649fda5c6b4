"""Runs with a gate: what a program can connect to, and what its result reports."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, Final

import msgspec
import pytest

from tests.lab.laboratory import ROUTER_6, SITE, SITE_6
from tests.vm.jail_helpers import (
    accounts_fixture,  # noqa: F401 - pytest finds it here
    ordinary_fixture,  # noqa: F401 - pytest finds it here
)
from x07_sandbox.policy.decode import default_policy, render_policy

if TYPE_CHECKING:
    from pathlib import Path

    from tests.lab.laboratory import Laboratory
    from tests.vm.jail_helpers import Account

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("image", "state")]

COMMAND: Final = [sys.executable, "-c", "import sys; from x07_sandbox.cli.main import main; sys.exit(main())"]
OS: Final = ("--sandbox-backend", "os", "--i-accept-weaker-isolation")
CONNECT: Final = """
import json, socket, sys
said = {}
for host, port in json.loads(sys.argv[1]):
    try:
        with socket.create_connection((host, port), timeout=60) as sock:
            try:
                name = f"[{host}]" if ":" in host else host
                sock.sendall(f"GET / HTTP/1.0\\r\\nHost: {name}\\r\\n\\r\\n".encode())
                said[f"{host}:{port}"] = sock.recv(1 << 16)[-5:].decode()
            except OSError as exc:
                said[f"{host}:{port}"] = f"later {type(exc).__name__}"
    except OSError as exc:
        said[f"{host}:{port}"] = type(exc).__name__ if exc.errno is None else exc.strerror
print(json.dumps(said))
"""


class Run:
    """Runs Python source in the laboratory."""

    def __init__(self, lab: Laboratory, place: Path) -> None:
        self.lab = lab
        self.place = place

    def __call__(self, code: str, *flags: str, args: tuple[str, ...] = (), **net: Any) -> dict[str, Any]:  # noqa: ANN401 - fields of net
        """Return the result. net: fields of the policy's `net` that no flag can set."""
        (self.place / "prog.py").write_text(code, encoding="utf-8")
        if net:
            document = msgspec.to_builtins(default_policy())
            document["net"] |= net
            (self.place / "policy.json").write_bytes(render_policy(document))
            flags = ("--policy", str(self.place / "policy.json"), *flags)
        done = self.lab.run(
            [*COMMAND, "run", "--json", *flags, str(self.place / "prog.py"), "--", *args], timeout_s=150
        )
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def connect(self, *ends: tuple[str, int], flags: tuple[str, ...] = (), **net: Any) -> tuple[Any, dict[str, Any]]:  # noqa: ANN401 - as above
        """Return the end of each connection by host and port, and the result."""
        result = self(CONNECT, *flags, args=(json.dumps(ends),), **net)
        assert result["outcome"] == "ok", (result["reason"], result["stderr"])
        return json.loads(result["stdout"]["text"]), result


@pytest.fixture
def run(lab: Laboratory, tmp_path: Path) -> Run:
    """Runs in the laboratory with the default names."""
    lab.reset_names()
    return Run(lab, tmp_path)


def hosts(*entries: tuple[str, int]) -> list[dict[str, Any]]:
    """Return entries of net.allow_hosts."""
    return [{"host": host, "ports": [port]} for host, port in entries]


def rows(result: dict[str, Any], kind: str) -> list[tuple[str, int, str]]:
    """Return the result's connections of one kind: host, port, rule."""
    return [(row["host"], row["port"], row["rule"]) for row in result["net"][kind]]


def test_a_program_gets_the_far_ends_errors(run: Run) -> None:
    """A program gets the far end's own connection errors, and refusals fail at once; the result lists each."""
    ends = ("web.lab.example", 80), ("web.lab.example", 81), ("web.lab.example", 443), ("other.lab.example", 80)
    said, result = run.connect(*ends, (SITE, 80), flags=("--allow-host", "web.lab.example:80,81"))
    assert said == {
        "web.lab.example:80": "hello",
        "web.lab.example:81": "Connection refused",
        "web.lab.example:443": "No route to host",
        "other.lab.example:80": "Name or service not known",
        f"{SITE}:80": "No route to host",
    }
    assert rows(result, "allowed") == [("web.lab.example", 80, "net.allow_hosts[0]")]
    assert rows(result, "failed") == [("web.lab.example", 81, "dial:failed")]
    assert rows(result, "denied") == [
        ("web.lab.example", 443, "net.allow_hosts[0].ports"),
        ("other.lab.example", 0, "net.allow_hosts"),
        (SITE, 80, "net.allow_hosts"),
    ]
    flags = [denial["how_to_allow"]["flag"] for denial in result["denials"]]
    added = ["web.lab.example:443", f"{SITE}:80", "other.lab.example:443"]
    assert flags == [f"--allow-host {host}" for host in added]
    (row,) = result["net"]["allowed"]
    assert (row["address"], row["count"], row["sent_bytes"] > 30, row["received_bytes"] > 5) == (SITE, 1, True, True)


def test_os_reaches_listed_hosts_too(run: Run) -> None:
    """Under `os` listed hosts can be reached; a refused connection is accepted first, then reset."""
    ends = ("web.lab.example", 80), ("web.lab.example", 81), ("other.lab.example", 80), (SITE, 80)
    said, result = run.connect(*ends, flags=(*OS, "--allow-host", "web.lab.example:80"))
    assert said.pop("web.lab.example:80") == "hello"
    assert said.pop("other.lab.example:80") == "Name or service not known"
    assert set(said.values()) <= {"later ConnectionResetError", "later BrokenPipeError", "Connection reset by peer"}
    assert rows(result, "allowed") == [("web.lab.example", 80, "net.allow_hosts[0]")]
    assert len(rows(result, "denied")) == 3
    (control,) = [control for control in result["controls"] if control["field"] == "net.allow_hosts"]
    assert (control["state"], control["by"]) == ("enforced", "the egress gate")
    assert "connection is reset" in control["why"]


@pytest.mark.user
@pytest.mark.parametrize(
    "flags",
    [pytest.param((), marks=pytest.mark.full("as in test_as_user.py")), OS],
    ids=["qemu", "os"],
)
def test_an_ordinary_user_reaches_listed_hosts(run: Run, ordinary: Account, flags: tuple[str, ...]) -> None:
    """An ordinary user's runs reach listed hosts and no others, as root's do."""
    program = ordinary.folder / "connect.py"
    program.write_text(CONNECT, encoding="ascii")
    ends = [("web.lab.example", 80), ("other.lab.example", 80)]
    words = ["run", "--json", *flags, "--allow-host", "web.lab.example:80", str(program), "--", json.dumps(ends)]
    result = json.loads(ordinary.x07(*words, inside=tuple(run.lab.gate_prefix)).stdout)
    assert result["outcome"] == "ok", (result["reason"], result["stderr"])
    assert list(json.loads(result["stdout"]["text"]).values()) == ["hello", "Name or service not known"]
    assert rows(result, "allowed") == [("web.lab.example", 80, "net.allow_hosts[0]")]


def test_none_refuses_a_list_of_hosts(run: Run) -> None:
    """`none` refuses a list of hosts, because it cannot enforce it."""
    result = run("pass\n", "--sandbox-backend", "none", "--i-accept-weaker-isolation", "--allow-host", "a.example:1")
    assert (result["outcome"], result["net"]) == ("refused", None)
    assert "net.allow_hosts" in result["reason"]


def test_a_run_without_hosts_has_no_gate(run: Run) -> None:
    """A run without a list of hosts has no gate, no relay, no log, and no connections in its result."""
    result = run("import socket\nsocket.create_connection(('192.0.2.1', 1))\n")
    assert "Network is unreachable" in result["stderr"]["text"]
    assert result["net"] is None
    assert not list((run.place / "home").rglob("net.jsonl"))


def test_the_log_of_connections_is_kept_and_written(run: Run) -> None:
    """`--net-log FILE` and `x07 logs --net` write one line of JSON for each event of a connection."""
    log = run.place / "log"
    run.connect(
        ("web.lab.example", 80), ("a.example", 1), flags=("--allow-host", "web.lab.example:80", "--net-log", str(log))
    )
    lines = [json.loads(line) for line in log.read_text(encoding="ascii").splitlines()]
    events = sorted((line["event"], line["host"]) for line in lines)
    assert events == [("closed", "web.lab.example"), ("denied", "a.example"), ("open", "web.lab.example")]
    assert run.lab.run([*COMMAND, "logs", "--net"]).stdout == log.read_bytes()


def test_a_loopback_entry_means_the_programs_own_loopback(run: Run) -> None:
    """An entry for 127.0.0.1 means the program's own loopback and never reaches the host."""
    code = """
import socket
with socket.create_server(("127.0.0.1", 8600)) as server:
    client = socket.create_connection(("127.0.0.1", 8600))
    server.accept()[0].sendall(b"mine")
    print(client.recv(9))
"""
    mark = run.lab.mark()
    result = run(code, allow_hosts=hosts(("127.0.0.1", 8600)))
    assert (result["outcome"], result["stdout"]["text"]) == ("ok", "b'mine'\n")
    assert run.lab.contacts(mark) == []


@pytest.mark.parametrize("flags", [(), pytest.param(OS, marks=pytest.mark.full("the same gate"))], ids=["qemu", "os"])
def test_ipv6_addresses_are_listed_and_reached(run: Run, flags: tuple[str, ...]) -> None:
    """A program reaches a listed IPv6 address or an IPv6-only name at its port, and nothing else by IPv6."""
    if not run.lab.ipv6:
        pytest.skip("this kernel has no IPv6")
    ends = (SITE_6, 8000), (ROUTER_6, 8000), (SITE_6, 8080), ("web6.lab.example", 8000)
    allowed = [word for host in (f"[{SITE_6}]:8000", "web6.lab.example:8000") for word in ("--allow-host", host)]
    said, result = run.connect(*ends, flags=(*flags, *allowed))
    assert [said[f"{SITE_6}:8000"], said["web6.lab.example:8000"]] == ["hello", "hello"]
    assert all("hello" not in said[f"{host}:{port}"] for host, port in ends[1:3])
    assert [row[:2] for row in rows(result, "denied")] == [(ROUTER_6, 8000), (SITE_6, 8080)]


def test_datagrams_go_to_listed_ports(run: Run) -> None:
    """With net.allow_udp a program exchanges datagrams with a listed name and port, and with nothing else."""
    code = """
import socket
for port in (9000, 9002):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        try:
            sock.connect(("raw.lab.example", port))
            for word in (b"one", b"two"):
                sock.send(word)
                print(sock.recv(99))
        except OSError as exc:
            print(type(exc).__name__)
"""
    result = run(code, allow_udp=True, allow_hosts=hosts(("raw.lab.example", 9000)))
    assert result["stdout"]["text"] in {f"b'one'\nb'two'\n{error}\n" for error in ("PermissionError", "OSError")}
    assert rows(result, "allowed") == [("raw.lab.example", 9000, "net.allow_hosts[0]")]
    assert rows(result, "denied") == [("raw.lab.example", 9002, "net.allow_hosts[0].ports")]
