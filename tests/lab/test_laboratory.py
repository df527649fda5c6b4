"""The laboratory itself: its log holds what no attack may cause."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.laboratory import SITE, Laboratory

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
