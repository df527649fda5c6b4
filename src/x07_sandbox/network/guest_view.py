"""Network configuration of the guest's relay: synthetic addresses for names, and allowed addresses and ports.

The host computes the configuration, because it normalizes names (names.py). The guest's rules are a second line of
defence: the gate decides again on every connection.
"""

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from itertools import pairwise
from typing import Any, Final

from x07_sandbox.channel.messages import Network
from x07_sandbox.errors import UsageError
from x07_sandbox.network.names import Wildcard, matches
from x07_sandbox.network.rules import Allowlist, Entry
from x07_sandbox.policy.hosts import Addresses, covers

_FIRST_NAME: Final = 16
_FIRST_BLOCK: Final = 4 * 256
_BLOCK: Final = 256
_V4: Final = 4
_SYNTHETIC: Final = Addresses(_V4, 0xC6120000, 0xC613FFFF)  # 198.18.0.0/15
_ELSEWHERE: Final = Addresses(_V4, 0xF0000000, 0xF001FFFF)  # 240.0.0.0/15, if the program may reach some of the other
# Addresses of guest/firewall, 192.0.0.8 and fd78:3037::1, and their neighbours, which the guest must refuse.
_OWN: Final = (Addresses(_V4, 0xC0000008, 0xC0000009), Addresses(6, 0xFD783037 << 96, (0xFD783037 << 96) + 1))


def guest_view(allowlist: Allowlist) -> Network:
    """Return the configuration of the relay (docs/guest-channel.md). Raises UsageError if there are too many names."""
    net = allowlist.policy.net
    names = sorted({entry.what for entry in allowlist.entries if isinstance(entry.what, str)})
    suffixes = sorted({entry.what.suffix for entry in allowlist.entries if isinstance(entry.what, Wildcard)})
    if not net.allow_dns:
        names, suffixes = [], []
    reserved = _synthetic(allowlist)
    block, name_at = reserved.first + _FIRST_BLOCK, reserved.first + _FIRST_NAME
    if block + len(suffixes) * _BLOCK - 1 > reserved.last or name_at + len(names) > block:
        fix = "List fewer names, or a wildcard for several of them"
        raise UsageError("cannot use the policy", "it lists too many names", fix)
    exact = {name: name_at + number for number, name in enumerate(names)}
    blocks = {suffix: block + number * _BLOCK for number, suffix in enumerate(suffixes)}
    tcp, udp = _Ports(), _Ports()
    for entry in allowlist.entries:
        ranges = _ranges(entry, reserved)
        ranges += [Addresses(_V4, address, address) for name, address in exact.items() if matches(entry.what, name)]
        # A name below a suffix also matches entries of shorter suffixes.
        if isinstance(entry.what, Wildcard):
            below = f".{entry.what.suffix}"
            wild = [at for suffix, at in blocks.items() if f".{suffix}".endswith(below)]
            ranges += [Addresses(_V4, at, at + _BLOCK - 1) for at in wild]
        for one in ranges:
            tcp.add(one, entry.ports)
            udp.add(one, entry.ports if entry.udp else frozenset())
    return Network(
        names={name: _text(address) for name, address in exact.items()},
        wildcards=[[suffix, _text(first)] for suffix, first in blocks.items()],
        tcp=tcp.rows() if net.allow_tcp else [],
        udp=udp.rows() if net.allow_udp else [],
    )


def _synthetic(allowlist: Allowlist) -> Addresses:
    """Return the network for the addresses of names: one of which the program may reach no address."""
    opened = [what for what, _ in allowlist.settings.allow_special]
    listed = [entry.what for entry in allowlist.entries if isinstance(entry.what, Addresses)]
    collides = all(any(covers(_SYNTHETIC, what) != "none" for what in group) for group in (opened, listed))
    return _ELSEWHERE if collides else _SYNTHETIC


class _Ports:
    """Ports by address range."""

    def __init__(self) -> None:
        self._given: list[tuple[Addresses, frozenset[int]]] = []

    def add(self, what: Addresses, ports: frozenset[int]) -> None:
        if ports:
            self._given.append((what, ports))

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


def _ranges(entry: Entry, reserved: Addresses) -> list[Addresses]:
    """Return an entry's address ranges without those that the guest uses itself."""
    parts = [entry.what] if isinstance(entry.what, Addresses) else []
    for used in (reserved, *_OWN):
        parts = [rest for part in parts for rest in _without(part, used)]
    return parts


def _without(part: Addresses, used: Addresses) -> list[Addresses]:
    if part.version != used.version:
        return [part]
    rests = (part.first, min(part.last, used.first - 1)), (max(part.first, used.last + 1), part.last)
    return [Addresses(part.version, first, last) for first, last in rests if first <= last]


def _text(number: int, version: int = 4) -> str:
    return str(IPv4Address(number) if version == _V4 else IPv6Address(number))
