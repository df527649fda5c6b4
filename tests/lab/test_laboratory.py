"""The laboratory itself: its log holds what no attack may cause."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.lab.laboratory import Laboratory

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
    """Packets to closed ports and unused addresses are listed as packets, and not as contacts."""
    mark = lab.mark()
    send = "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('1.1.1.1', 53)); "
    lab.python(send + "print(socket.socket().connect_ex(('46.46.46.46', 81)))")
    lab.wait_quiet()
    found = [(packet.where, packet.proto, packet.data) for packet in lab.packets(mark)]
    assert (lab.contacts(mark), found) == ([], [("1.1.1.1:53", "udp", "x"), ("46.46.46.46:81", "tcp", "")])
