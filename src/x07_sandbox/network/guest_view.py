"""What a guest's relay is told of a policy: synthetic addresses of names, and what may be asked for at all.

It is derived from the same policy that lies in /x07/in/policy.json, on the host, since the normal form of names is
made in one place (names.py). The guest's rules are a second wall: the gate decides again, about every connection.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, summarize_address_range
from typing import TYPE_CHECKING, Any, Final

from x07_sandbox.network.floor import special
from x07_sandbox.network.names import Wildcard, matches
from x07_sandbox.policy.hosts import Addresses

if TYPE_CHECKING:
    from x07_sandbox.network.rules import Allowlist, Entry

_FIRST_NAME: Final = int(IPv4Address("198.18.0.16"))  # 198.18.0.1 is where a program's connections come from
_FIRST_BLOCK: Final = int(IPv4Address("198.19.0.0"))
_BLOCK: Final = 256
_V4: Final = 4
_LOOPBACK: Final = "deny-floor:loopback"


def guest_view(allowlist: Allowlist) -> dict[str, Any]:
    """Return `network` of START (docs/guest-channel.md)."""
    net = allowlist.policy.net
    names = sorted({entry.what for entry in allowlist.entries if isinstance(entry.what, str)})
    suffixes = sorted({entry.what.suffix for entry in allowlist.entries if isinstance(entry.what, Wildcard)})
    if not net.allow_dns:
        names, suffixes = [], []
    exact = {name: _text(_FIRST_NAME + number) for number, name in enumerate(names)}
    blocks = {suffix: _FIRST_BLOCK + number * _BLOCK for number, suffix in enumerate(suffixes)}
    tcp, udp = _Ports(), _Ports()
    for name, address in exact.items():
        for entry in allowlist.entries:
            if matches(entry.what, name):
                tcp.add(address, address, entry.ports)
                udp.add(address, address, entry.ports if entry.udp else frozenset())
    for suffix, first in blocks.items():
        # A name below it may match entries of wildcards above it too.
        for entry in allowlist.entries:
            if isinstance(entry.what, Wildcard) and f".{suffix}".endswith(f".{entry.what.suffix}"):
                ends = _text(first), _text(first + _BLOCK - 1)
                tcp.add(*ends, entry.ports)
                udp.add(*ends, entry.ports if entry.udp else frozenset())
    routes: dict[str, None] = {}
    for entry in allowlist.entries:
        for network in _networks(entry):
            routes[str(network)] = None
            ends = str(network[0]), str(network[-1])
            tcp.add(*ends, entry.ports)
            udp.add(*ends, entry.ports if entry.udp else frozenset())
    return {
        "names": exact,
        "wildcards": [[suffix, _text(first)] for suffix, first in blocks.items()],
        "tcp": tcp.rows() if net.allow_tcp else [],
        "udp": udp.rows() if net.allow_udp else [],
        "routes": list(routes),
    }


class _Ports:
    """Ports by range of addresses, united."""

    def __init__(self) -> None:
        self._ports: dict[tuple[str, str], set[int]] = {}

    def add(self, first: str, last: str, ports: frozenset[int]) -> None:
        if ports:
            self._ports.setdefault((first, last), set()).update(ports)

    def rows(self) -> list[list[Any]]:
        return [[first, last, sorted(ports)] for (first, last), ports in self._ports.items()]


def _networks(entry: Entry) -> list[IPv4Network]:
    """The networks that an entry of addresses needs routes to. IPv6 has none: see "Known limits" in docs/network.md."""
    if not isinstance(entry.what, Addresses) or entry.what.version != _V4:
        return []
    first, last = IPv4Address(entry.what.first), IPv4Address(entry.what.last)
    if all((found := special(end)) is not None and found[0] == _LOOPBACK for end in (first, last)):
        return []  # the guest's own
    return [network for network in summarize_address_range(first, last) if isinstance(network, IPv4Network)]


def _text(number: int) -> str:
    return str(IPv4Address(number))
