"""Network configuration of the guest's relay: synthetic addresses for names, and allowed addresses and ports.

The host computes the configuration, because it normalizes names (names.py). The guest's rules are a second line of
defence: the gate decides again on every connection.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from x07_sandbox.errors import UsageError
from x07_sandbox.network.names import Wildcard, matches
from x07_sandbox.policy.hosts import Addresses

if TYPE_CHECKING:
    from collections.abc import Iterator

    from x07_sandbox.network.rules import Allowlist, Entry

_FIRST_NAME: Final = int(IPv4Address("198.18.0.16"))  # 198.18.0.1 is the source of a program's connections
_FIRST_BLOCK: Final = int(IPv4Address("198.18.4.0"))
_BLOCK: Final = 256
_SYNTHETIC: Final = tuple(int(IPv4Network("198.18.0.0/15")[at]) for at in (0, -1))
_V4: Final = 4


def guest_view(allowlist: Allowlist) -> dict[str, Any]:
    """Return the `network` field of START (docs/guest-channel.md). Raises UsageError if there are too many names."""
    net = allowlist.policy.net
    names = sorted({entry.what for entry in allowlist.entries if isinstance(entry.what, str)})
    suffixes = sorted({entry.what.suffix for entry in allowlist.entries if isinstance(entry.what, Wildcard)})
    if not net.allow_dns:
        names, suffixes = [], []
    if _FIRST_BLOCK + len(suffixes) * _BLOCK - 1 > _SYNTHETIC[1] or _FIRST_NAME + len(names) > _FIRST_BLOCK:
        fix = "List fewer names, or a wildcard for several of them"
        raise UsageError("cannot use the policy", "it lists too many names", fix)
    exact = {name: _FIRST_NAME + number for number, name in enumerate(names)}
    blocks = {suffix: _FIRST_BLOCK + number * _BLOCK for number, suffix in enumerate(suffixes)}
    tcp, udp = _Ports(), _Ports()
    for entry in allowlist.entries:
        ranges = _ranges(entry)
        ranges += [Addresses(_V4, address, address) for name, address in exact.items() if matches(entry.what, name)]
        # A name below a suffix also matches entries of shorter suffixes.
        ranges += [Addresses(_V4, at, at + _BLOCK - 1) for suffix, at in blocks.items() if _covers(entry, suffix)]
        for addresses in ranges:
            tcp.add(addresses, entry.ports)
            udp.add(addresses, entry.ports if entry.udp else frozenset())
    return {
        "names": {name: _text(address) for name, address in exact.items()},
        "wildcards": [[suffix, _text(first)] for suffix, first in blocks.items()],
        "tcp": tcp.rows() if net.allow_tcp else [],
        "udp": udp.rows() if net.allow_udp else [],
    }


def _covers(entry: Entry, suffix: str) -> bool:
    """Return whether an entry applies to all names below *suffix*."""
    return isinstance(entry.what, Wildcard) and f".{suffix}".endswith(f".{entry.what.suffix}")


class _Ports:
    """Ports by address range."""

    def __init__(self) -> None:
        self._given: list[tuple[Addresses, frozenset[int]]] = []

    def add(self, addresses: Addresses, ports: frozenset[int]) -> None:
        if ports:
            self._given.append((addresses, ports))

    def rows(self) -> list[list[Any]]:
        """Return rows of first address, last address and ports, with disjoint ranges as the kernel requires."""
        return [row for version in (4, 6) for row in self._rows(version)]

    def _rows(self, version: int) -> Iterator[list[Any]]:
        given = [(one.first, one.last + 1, ports) for one, ports in self._given if one.version == version]
        edges = sorted({edge for first, end, _ in given for edge in (first, end)})
        for first, end in pairwise(edges):
            ports = frozenset().union(*(ports for low, high, ports in given if low <= first and end <= high))
            if ports:
                yield [_text(first, version), _text(end - 1, version), sorted(ports)]


def _ranges(entry: Entry) -> list[Addresses]:
    """Return an entry's address ranges without the synthetic addresses."""
    if not isinstance(entry.what, Addresses):
        return []
    version, first, last = entry.what.version, entry.what.first, entry.what.last
    if version != _V4:
        return [entry.what]
    parts = [(first, min(last, _SYNTHETIC[0] - 1)), (max(first, _SYNTHETIC[1] + 1), last)]
    return [Addresses(version, low, high) for low, high in parts if low <= high]


def _text(number: int, version: int = 4) -> str:
    return str(IPv4Address(number) if version == _V4 else IPv6Address(number))
