"""Fuzz target: hosts that a guest asks for, in the one normal form.

What must hold:

* a host is in normal form, or there is a UsageError, and nothing else;
* the normal form is its own normal form, also for the guest's strict parser and for a pattern of a list;
* no name is what the C library reads as an address, and none holds bytes that a resolver or a log could misread;
* upper case and one final dot make no other host.
"""

from __future__ import annotations

import re
import socket
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from x07_sandbox.errors import UsageError
from x07_sandbox.network.blocked_addresses import special
from x07_sandbox.network.names import Host, matches, parse_guest_host, parse_host, parse_pattern

_NAME: Final = re.compile(r"(?=.{1,253}\Z)[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*")


def one_input(data: bytes) -> None:
    """Check one input. Raises AssertionError, or whatever it was that should never have been raised."""
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
    """The host, or None where there is none."""
    try:
        return parse_guest_host(data)
    except UsageError:
        return None


def check_name(name: str) -> None:
    """A name is nothing but a name."""
    assert _NAME.fullmatch(name)
    assert parsed(f"{name}.".encode("ascii")) in {name, None}  # 253 bytes and a dot are more than a text may have
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.getaddrinfo(name, None, family, flags=socket.AI_NUMERICHOST)
        except socket.gaierror:
            continue
        raise AssertionError(f"{name} is an address to the C library")
