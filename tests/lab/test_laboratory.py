"""The laboratory itself: its servers answer, its log holds exactly the contacts, and it leaves no remains."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.lab.laboratory import DNS_ADDRESS, LAN, METADATA_6, SITE, SITE_6, Answer, Laboratory, leftovers, remove_dead
from x07_sandbox.host.processes import identify, wait_gone

if TYPE_CHECKING:
    from tests.lab.laboratory import Contact

pytestmark = [pytest.mark.network, pytest.mark.root]

ROOT = Path(__file__).resolve().parents[2]
HTTP = """
import http.client, socket, ssl, sys
scheme, host, port, *paths = sys.argv[1:]
if scheme == "http":
    client = http.client.HTTPConnection(host, int(port), timeout=10)
else:
    client = http.client.HTTPSConnection(host, int(port), timeout=10, context=ssl.create_default_context(cafile=scheme))
for path in paths:
    if path == "/echo":
        client.request("POST", path, body=iter([b"some", b" words"]), encode_chunked=True,
                       headers={"Transfer-Encoding": "chunked"})
    else:
        client.request("GET", path)
    answer = client.getresponse()
    print(answer.status, answer.read()[:20])
"""
TALK = """
import socket, sys
kind, host, port, text = sys.argv[1:]
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM) as client:
    client.settimeout(5)
    if kind == "udp":
        client.sendto(text.encode(), (host, int(port)))
        data, peer = client.recvfrom(100)
        print(data, peer[0] == host, peer[1] == int(port))
    else:
        client.connect((host, int(port)))
        client.sendall(text.encode())
        print(client.recv(100))
"""
RESOLVE = """
import socket, sys
for name in sys.argv[1:]:
    try:
        print(sorted({found[4][0] for found in socket.getaddrinfo(name, 80, type=socket.SOCK_STREAM)}))
    except OSError as error:
        print(type(error).__name__, error.errno)
"""


def comparable(contacts: list[Contact]) -> list[tuple[str, ...]]:
    """Return contacts without what differs between runs; the order of A and AAAA questions is ignored."""
    return [(found.where, found.proto, found.event, found.data, found.name) for found in contacts]


def test_a_web_request_is_logged_with_its_host(lab: Laboratory) -> None:
    """A plain HTTP client in the laboratory gets its answers; the log has the connection and each request."""
    mark = lab.mark()
    assert lab.python(HTTP, "http", SITE, "80", "/", "/echo", "/bytes/3", "/chunked").splitlines() == [
        "200 b'hello'",
        "200 b'some words'",
        r"200 b'\x00\x00\x00'",
        "200 b'hello'",
    ]
    lab.wait_quiet()
    assert comparable(lab.contacts(mark)) == [
        (f"{SITE}:80", "tcp", "connect", "", ""),
        (f"{SITE}:80", "http", "request", "GET / HTTP/1.1", SITE),
        (f"{SITE}:80", "http", "request", "POST /echo HTTP/1.1", SITE),
        (f"{SITE}:80", "http", "bytes", "some words", ""),
        (f"{SITE}:80", "http", "request", "GET /bytes/3 HTTP/1.1", SITE),
        (f"{SITE}:80", "http", "request", "GET /chunked HTTP/1.1", SITE),
    ]
    assert [(found.where, found.proto) for found in lab.packets(mark)] == [(f"{SITE}:80", "tcp")]


def test_a_tls_client_that_trusts_the_laboratory_reaches_it_by_name(lab: Laboratory) -> None:
    """The log of a TLS client that resolves a name has its DNS questions, its SNI and its request."""
    mark = lab.mark()
    assert lab.python(HTTP, str(lab.ca_file), "web.lab.example", "443", "/", "/bytes/100000").count("200 b'") == 2
    lab.wait_quiet()
    contacts = lab.contacts(mark)
    assert {found.name for found in contacts if found.event == "query"} == {"web.lab.example"}
    assert comparable([found for found in contacts if found.proto != "dns"]) == [
        (f"{SITE}:443", "tcp", "connect", "", ""),
        (f"{SITE}:443", "tls", "connect", "", "web.lab.example"),
        (f"{SITE}:443", "http", "request", "GET / HTTP/1.1", "web.lab.example"),
        (f"{SITE}:443", "http", "request", "GET /bytes/100000 HTTP/1.1", "web.lab.example"),
    ]


def test_a_failed_handshake_is_logged_with_its_name(lab: Laboratory) -> None:
    """The log of a TLS client that rejects the certificate has its SNI and no request."""
    mark = lab.mark()
    code = HTTP.replace("cafile=scheme", "")
    failed = lab.run([sys.executable, "-c", code, "x", "a.wild.lab.example", "443", "/"])
    assert b"CERTIFICATE_VERIFY_FAILED" in failed.stderr
    lab.wait_quiet()
    assert comparable([found for found in lab.contacts(mark) if found.proto not in {"dns", "tcp"}]) == [
        (f"{SITE}:443", "tls", "connect", "", "a.wild.lab.example")
    ]


@pytest.mark.parametrize(
    ("kind", "host", "port", "answer"),
    [
        ("udp", SITE, 9000, "b'probe' True True"),
        ("udp", LAN, 53, "b'probe' True True"),
        ("udp", SITE, 9001, "b'probe' True False"),
        ("tcp", SITE, 7, "b'probe'"),
        ("tcp", "169.254.169.254", 2222, r"b'SSH-2.0-lab\r\n'"),
        ("tcp", "127.0.0.1", 8600, r"b'host secret\r\n'"),
        ("tcp", "45.45.45.1", 8600, r"b'host secret\r\n'"),
    ],
)
def test_each_server_answers_and_logs(lab: Laboratory, kind: str, host: str, port: int, answer: str) -> None:
    """Each server answers according to its port, and logs the bytes that it received."""
    mark = lab.mark()
    assert lab.python(TALK, kind, host, str(port), "probe").strip() == answer
    lab.wait_quiet()
    where = f"{host}:{port}"
    connect = [(where, "tcp", "connect", "", "")] if kind == "tcp" else []
    assert comparable(lab.contacts(mark)) == [*connect, (where, kind, "bytes", "probe", "")]


def test_hostile_bytes_are_logged_and_stop_no_server(lab: Laboratory) -> None:
    """Bytes that are neither HTTP, TLS nor DNS are logged as bytes, and the servers keep running."""
    mark = lab.mark()
    code = """
import socket
for port in (80, 443, 53, 5432):
    host = "45.45.45.53" if port == 53 else "46.46.46.46"
    with socket.create_connection((host, port), 5) as client:
        client.sendall(b"\\0\\5\\xff\\r\\n\\x1b[" + bytes([port % 251]))
    with socket.socket(type=socket.SOCK_DGRAM) as client:
        client.sendto(b"\\xff" * 40, ("45.45.45.53", 53))
"""
    lab.python(code)
    lab.wait_quiet()
    bytes_of = {(found.where, found.proto) for found in lab.contacts(mark) if found.event == "bytes"}
    assert bytes_of == {
        (f"{SITE}:80", "http"),
        (f"{SITE}:443", "tls"),
        (f"{SITE}:5432", "tcp"),
        (f"{DNS_ADDRESS}:53", "dns"),
    }
    assert all(found.data.isprintable() for found in lab.contacts(mark))
    assert lab.python(HTTP, str(lab.ca_file), "web.lab.example", "8443", "/").startswith("200")


def test_names_answer_as_scripted(lab: Laboratory) -> None:
    """The laboratory's DNS server gives scripted answers, also in sequence, and NXDOMAIN for other names."""
    lab.reset_names()
    names = ["rebind.lab.example", "rebind.lab.example", "cname-private.lab.example", "x.y.wild.lab.example"]
    names += ["mixed.lab.example", "mapped.lab.example", "new.lab.example", "late.example", "nobody.example"]
    lab.names({"new.lab.example": [LAN], "late.example": Answer(addresses=(SITE,), delay_s=0.3)})
    mark = lab.mark()
    answers = lab.python(RESOLVE, *names, "hosts-file.example").splitlines()
    assert answers == [
        "['46.46.46.46']",
        "['127.0.0.1']",
        "['10.7.7.7']",
        "['46.46.46.46']",
        "['192.168.77.5', '46.46.46.46']",
        "['::ffff:127.0.0.1']",
        "['192.168.77.5']",
        "['46.46.46.46']",
        "gaierror -2",
        "['10.7.7.7']",
    ]
    lab.wait_quiet()
    assert {found.name for found in lab.contacts(mark)} == {*names, "nobody.example.searched.example"}
    lab.reset_names()
    assert lab.python(RESOLVE, "new.lab.example", "rebind.lab.example").split("\n")[:2] == ["gaierror -2", answers[0]]


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


def test_ipv6_reaches_the_same_servers(lab: Laboratory) -> None:
    """If the kernel has IPv6, a site and a metadata address are reachable by it, and the log shows it."""
    if not lab.ipv6:
        pytest.skip("this kernel has no IPv6")
    mark = lab.mark()
    for address in (SITE_6, METADATA_6):
        assert lab.python(HTTP, "http", address, "80", "/").startswith("200")
    lab.wait_quiet()
    requests = [found.where for found in lab.contacts(mark) if found.event == "request"]
    assert requests == [f"[{SITE_6}]:80", f"[{METADATA_6}]:80"]
    assert [found.where for found in lab.packets(mark)] == requests


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
    assert client.wait(10) == -signal.SIGKILL
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
