"""Fuzz target: hosts that a guest asks for, in their normal form.

Invariants:

* a host gives its normal form or a UsageError, nothing else;
* normalizing twice changes nothing, also for the guest's strict parser and for a pattern of a list;
* no name is one that the C library reads as an address or that holds bytes that a resolver or a log could misread;
* upper case and one final dot do not change the host.
"""

from __future__ import annotations

import re
import socket
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from x07_sandbox.errors import UsageError
from x07_sandbox.network.hosts import Host, matches, parse_guest_host, parse_host, parse_pattern, special

_NAME: Final = re.compile(r"(?=.{1,253}\Z)[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*")


HOSTS: Final = (
    *("A.Example.org.", "xn--fa-hia.example", "xn--a.example", f"xn--hoa{'4' * 53}aaa.example", "_srv-1.example"),
    *("192.0.2.7", "127.1", "0x7f.1", "017700000001", "[2001:db8::1]", "::ffff:127.0.0.1", "fe80::1%lo"),
    *("*.example.org", "a b", "a\0b", "a" * 64, ".".join(["a" * 63] * 4)),
)


def seeds() -> dict[str, bytes]:
    """Return hosts as guests write them, valid and invalid."""
    return {str(number): host.encode() for number, host in enumerate(HOSTS)}


def one_input(data: bytes) -> None:
    """Check one input. Raises AssertionError, or any exception that the code under test must not raise."""
    host = parsed(data)
    if host is None:
        return
    text = str(host)
    assert parse_host(text) == host
    assert parsed(text.encode("ascii")) == host
    assert parsed(text.upper().encode("ascii")) == host
    assert matches(parse_pattern(text), host)
    special(host)
    if isinstance(host, str):
        check_name(host)
    elif isinstance(host, IPv6Address):
        assert host.ipv4_mapped is None
    else:
        assert isinstance(host, IPv4Address)


def parsed(data: bytes) -> Host | None:
    """Return the host, or None if it is invalid."""
    try:
        return parse_guest_host(data)
    except UsageError:
        return None


def check_name(name: str) -> None:
    """Check that a name is safe."""
    assert _NAME.fullmatch(name)
    assert parsed(f"{name}.".encode("ascii")) in {name, None}  # 253 bytes and a dot are longer than a text may be
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.getaddrinfo(name, None, family, flags=socket.AI_NUMERICHOST)
        except socket.gaierror:
            continue
        raise AssertionError(f"{name} is an address to the C library")
