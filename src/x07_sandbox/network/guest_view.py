"""What a guest's relay is told of a policy: synthetic addresses of names, and what may be asked for at all.

It is derived from the same policy that lies in /x07/in/policy.json, on the host, since the normal form of names is
made in one place (names.py). The guest's rules are a second wall: the gate decides again, about every connection.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from x07_sandbox.network.names import Wildcard, matches
from x07_sandbox.policy.hosts import Addresses

if TYPE_CHECKING:
    from x07_sandbox.network.rules import Allowlist, Entry

_FIRST_NAME: Final = int(IPv4Address("198.18.0.16"))  # 198.18.0.1 is where a program's connections come from
_FIRST_BLOCK: Final = int(IPv4Address("198.19.0.0"))
_BLOCK: Final = 256
_SYNTHETIC: Final = tuple(int(IPv4Network("198.18.0.0/15")[at]) for at in (0, -1))
_V4: Final = 4


def guest_view(allowlist: Allowlist) -> dict[str, Any]:
    """Return `network` of START (docs/guest-channel.md)."""
    net = allowlist.policy.net
    names = sorted({entry.what for entry in allowlist.entries if isinstance(entry.what, str)})
    suffixes = sorted({entry.what.suffix for entry in allowlist.entries if isinstance(entry.what, Wildcard)})
    if not net.allow_dns:
        names, suffixes = [], []
    exact = {name: _FIRST_NAME + number for number, name in enumerate(names)}
    blocks = {suffix: _FIRST_BLOCK + number * _BLOCK for number, suffix in enumerate(suffixes)}
    tcp, udp = _Ports(), _Ports()
    for entry in allowlist.entries:
        ranges = _ranges(entry)
        ranges += [(address, address) for name, address in exact.items() if matches(entry.what, name)]
        # A name below a suffix may match entries of the suffixes above it too.
        ranges += [(first, first + _BLOCK - 1) for suffix, first in blocks.items() if _covers(entry, suffix)]
        for first, last in ranges:
            tcp.add(first, last, entry.ports)
            udp.add(first, last, entry.ports if entry.udp else frozenset())
    return {
        "names": {name: _text(address) for name, address in exact.items()},
        "wildcards": [[suffix, _text(first)] for suffix, first in blocks.items()],
        "tcp": tcp.rows() if net.allow_tcp else [],
        "udp": udp.rows() if net.allow_udp else [],
    }


def _covers(entry: Entry, suffix: str) -> bool:
    """Whether an entry is for all names below a suffix."""
    return isinstance(entry.what, Wildcard) and f".{suffix}".endswith(f".{entry.what.suffix}")


class _Ports:
    """Ports by range of addresses."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int, frozenset[int]]] = []

    def add(self, first: int, last: int, ports: frozenset[int]) -> None:
        if ports:
            self._ranges.append((first, last + 1, ports))

    def rows(self) -> list[list[Any]]:
        """First and last address, and ports, of ranges that do not overlap: the kernel's sets take no others."""
        edges = sorted({edge for first, end, _ in self._ranges for edge in (first, end)})
        rows: list[list[Any]] = []
        for first, end in pairwise(edges):
            ports = frozenset().union(*(ports for low, high, ports in self._ranges if low <= first and end <= high))
            if ports:
                rows.append([_text(first), _text(end - 1), sorted(ports)])
        return rows


def _ranges(entry: Entry) -> list[tuple[int, int]]:
    """First and last address of an entry of IPv4 addresses, without those that stand for names.

    IPv6 has none: see "Limits" in docs/network.md.
    """
    if not isinstance(entry.what, Addresses) or entry.what.version != _V4:
        return []
    first, last = entry.what.first, entry.what.last
    parts = [(first, min(last, _SYNTHETIC[0] - 1)), (max(first, _SYNTHETIC[1] + 1), last)]
    return [(low, high) for low, high in parts if low <= high]


def _text(number: int) -> str:
    return str(IPv4Address(number))
