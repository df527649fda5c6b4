"""Meaning of an allowlist entry's host, one name or a range of addresses, and ports. No policy is needed for it."""

from ipaddress import ip_address, ip_network
from typing import Final, Literal

import msgspec

from x07_sandbox.errors import UsageError

Cover = Literal["whole", "part", "none"]

PORT_LAST: Final = 65_535
_V4_BITS = 32
_V4_IN_V6 = 0xFFFF  # ::ffff:0:0/96: the IPv4-mapped addresses


class Addresses(msgspec.Struct, frozen=True):
    """All addresses of one IP version from *first* to *last*, both as numbers."""

    version: int
    first: int
    last: int


def addresses(host: str) -> Addresses | None:
    """Return the range of an address (brackets are allowed), CIDR network or range, or None if *host* is a name."""
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    try:
        if "/" in host:
            network = ip_network(host, strict=False)
            return _unmapped(network.version, int(network[0]), int(network[-1]))
        low, dash, high = host.partition("-")
        first = ip_address(low)
        last = ip_address(high) if dash else first
    except ValueError:
        return None
    if first.version != last.version or int(first) > int(last):
        return None
    return _unmapped(first.version, int(first), int(last))


def is_name(host: str) -> bool:
    """Return whether *host* has to be resolved. An IPv6 address is not a name, although it may contain letters."""
    return addresses(host) is None and any(char.isalpha() for char in host)


def meaning(host: str) -> Addresses | str:
    """Return what *host* stands for: addresses, or a name in normal form."""
    return addresses(host) or host.lower().rstrip(".")


def covers(mine: Addresses | str, theirs: Addresses | str) -> Cover:
    """Return how much of *theirs* is included in *mine*."""
    if isinstance(mine, str) or isinstance(theirs, str):
        return "whole" if mine == theirs else "none"
    if mine.version != theirs.version or theirs.last < mine.first or mine.last < theirs.first:
        return "none"
    return "whole" if mine.first <= theirs.first and theirs.last <= mine.last else "part"


def port_number(text: str) -> int:
    """Return the port that *text* names, or 0 if it names none."""
    number = int(text) if text.isascii() and text.isdigit() and len(text) <= len(str(PORT_LAST)) else 0
    return number if number <= PORT_LAST else 0


def split_port(text: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT``. Raises UsageError."""
    host, colon, port = text.rpartition(":")
    fix = "Write HOST:PORT, such as example.org:443 or [2001:db8::1]:443"
    if not colon or not port or text.endswith("]"):
        raise UsageError(f"cannot use {text!r}", "the port is missing", fix)
    if not (number := port_number(port)):
        raise UsageError(f"cannot use {text!r}", f"the port is not a number from 1 to {PORT_LAST}", fix)
    if ":" in host and not host.startswith("["):
        raise UsageError(f"cannot use {text!r}", "an IPv6 address with a port needs brackets", fix)
    return host, number


def _unmapped(version: int, first: int, last: int) -> Addresses:
    if version != 4 and first >> _V4_BITS == last >> _V4_BITS == _V4_IN_V6:  # noqa: PLR2004 - IPv4
        mask = (1 << _V4_BITS) - 1
        return Addresses(4, first & mask, last & mask)
    return Addresses(version, first, last)
