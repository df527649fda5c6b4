"""The relay in the guest, without the guest's firewall."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any, Final

from x07_sandbox.channel import egress, streams
from x07_sandbox.guest.dns import NameTable
from x07_sandbox.guest.relay import Relay

REPORT_MAX: Final = streams.HEADER.size + 3 + egress.HOST_MAX


def test_queued_refusal_reports_are_bounded() -> None:
    """A program that looks up unlisted names again and again does not fill the relay's memory with reports."""
    near, far = socket.socketpair()
    with near, far, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as dns:
        sockets: Any = SimpleNamespace(tcp=[], udp=[], held=None, dns=dns)
        relay = Relay(near.fileno(), NameTable({}, []), sockets)
        for number in range(10_000):
            relay._report_name(f"{'x' * 200}.{number}")  # noqa: SLF001 - what a lookup calls
        assert egress.WINDOW <= relay._link.pending() <= egress.WINDOW + REPORT_MAX  # noqa: SLF001 - the promise
