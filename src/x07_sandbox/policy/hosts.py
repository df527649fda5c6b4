"""What the host of an allowlist entry stands for: one name, or a set of addresses."""

from ipaddress import ip_address, ip_network
from typing import Literal

import msgspec

Cover = Literal["whole", "part", "none"]

_V4_BITS = 32
_V4_IN_V6 = 0xFFFF  # ::ffff:0:0/96 holds the IPv4 addresses once more


class Addresses(msgspec.Struct, frozen=True):
    """All addresses from *first* to *last*, as numbers, of one IP version."""

    version: int
    first: int
    last: int


def addresses(host: str) -> Addresses | None:
    """The addresses that *host* stands for (an address, also in brackets, a CIDR network, a range); None for a name."""
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    try:
        if "/" in host:
            network = ip_network(host, strict=False)
            return _plain(network.version, int(network[0]), int(network[-1]))
        low, dash, high = host.partition("-")
        first = ip_address(low)
        last = ip_address(high) if dash else first
    except ValueError:
        return None
    if first.version != last.version or int(first) > int(last):
        return None
    return _plain(first.version, int(first), int(last))


def is_name(host: str) -> bool:
    """Whether *host* has to be looked up. An IPv6 address is no name, although it may hold letters."""
    return addresses(host) is None and any(char.isalpha() for char in host)


def meaning(host: str) -> Addresses | str:
    """What *host* stands for: addresses, or a name in the form in which equal names are equal."""
    return addresses(host) or host.lower().rstrip(".")


def covers(mine: Addresses | str, theirs: Addresses | str) -> Cover:
    """How much of what *theirs* stands for is meant by *mine*."""
    if isinstance(mine, str) or isinstance(theirs, str):
        return "whole" if mine == theirs else "none"
    if mine.version != theirs.version or theirs.last < mine.first or mine.last < theirs.first:
        return "none"
    return "whole" if mine.first <= theirs.first and theirs.last <= mine.last else "part"


def _plain(version: int, first: int, last: int) -> Addresses:
    if version != 4 and first >> _V4_BITS == last >> _V4_BITS == _V4_IN_V6:  # noqa: PLR2004 - IPv4
        mask = (1 << _V4_BITS) - 1
        return Addresses(4, first & mask, last & mask)
    return Addresses(version, first, last)
