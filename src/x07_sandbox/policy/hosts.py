"""Meaning of the host of an allowlist entry: one name or a range of addresses. The gate loads it without the policy."""

from ipaddress import ip_address, ip_network
from typing import Literal

import msgspec

Cover = Literal["whole", "part", "none"]

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


def _unmapped(version: int, first: int, last: int) -> Addresses:
    if version != 4 and first >> _V4_BITS == last >> _V4_BITS == _V4_IN_V6:  # noqa: PLR2004 - IPv4
        mask = (1 << _V4_BITS) - 1
        return Addresses(4, first & mask, last & mask)
    return Addresses(version, first, last)
