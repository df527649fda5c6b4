"""NAT64: IPv6 addresses that a translator of the network forwards to the IPv4 address embedded in them (RFC 6052).

A network announces its prefixes in the IPv6 addresses of ``ipv4only.arpa``, which embed a well-known IPv4 address
(RFC 7050).
"""

from collections.abc import Collection, Iterable
from ipaddress import IPv4Address, IPv6Address, IPv6Network
from typing import Final

from x07_sandbox.network.names import Address

NAME: Final = "ipv4only.arpa"
WELL_KNOWN: Final = IPv6Network("64:ff9b::/96")
_IPV4_ONLY: Final = frozenset(map(IPv4Address, ("192.0.0.170", "192.0.0.171")))
# The bytes of an IPv6 address that hold the IPv4 address, by the length of the prefix. Byte 8 is always left out.
_BYTES: Final = {
    32: (4, 5, 6, 7),
    40: (5, 6, 7, 9),
    48: (6, 7, 9, 10),
    56: (7, 9, 10, 11),
    64: (9, 10, 11, 12),
    96: (12, 13, 14, 15),
}


def prefixes(answers: Iterable[Address]) -> set[IPv6Network]:
    """Return the prefixes that addresses of ``ipv4only.arpa`` announce: every length at which one of them fits."""
    return {
        IPv6Network((int(address), length), strict=False)
        for address in answers
        if isinstance(address, IPv6Address)
        for length in _BYTES
        if _at(address, length) in _IPV4_ONLY
    }


def embedded(address: Address, known: Collection[IPv6Network]) -> list[IPv4Address]:
    """Return the IPv4 addresses that translators with the *known* or the well-known prefix read from *address*."""
    if not isinstance(address, IPv6Address):
        return []
    return [_at(address, one.prefixlen) for one in (WELL_KNOWN, *known) if address in one]


def _at(address: IPv6Address, length: int) -> IPv4Address:
    packed = address.packed
    return IPv4Address(bytes(packed[at] for at in _BYTES[length]))
