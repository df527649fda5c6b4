"""What a guest's relay is told of a policy: synthetic addresses of names, and what may be asked for at all.

It is derived from the same policy that lies in /x07/in/policy.json, on the host, since the normal form of names is
made in one place (names.py). The guest's rules are a second wall: the gate decides again, about every connection.
"""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Any, Final

from x07_sandbox.network.names import Wildcard, matches
from x07_sandbox.policy.hosts import Addresses

if TYPE_CHECKING:
    from x07_sandbox.network.rules import Allowlist, Entry

_FIRST_NAME: Final = int(IPv4Address("198.18.0.16"))  # 198.18.0.1 is where a program's connections come from
_FIRST_BLOCK: Final = int(IPv4Address("198.19.0.0"))
_BLOCK: Final = 256
_V4: Final = 4


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
    for entry in allowlist.entries:
        if (addresses := _ends(entry)) is not None:
            tcp.add(*addresses, entry.ports)
            udp.add(*addresses, entry.ports if entry.udp else frozenset())
    return {
        "names": exact,
        "wildcards": [[suffix, _text(first)] for suffix, first in blocks.items()],
        "tcp": tcp.rows() if net.allow_tcp else [],
        "udp": udp.rows() if net.allow_udp else [],
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


def _ends(entry: Entry) -> tuple[str, str] | None:
    """First and last address of an entry of IPv4 addresses. IPv6 has none: see "Limits" in docs/network.md."""
    if not isinstance(entry.what, Addresses) or entry.what.version != _V4:
        return None
    return _text(entry.what.first), _text(entry.what.last)


def _text(number: int) -> str:
    return str(IPv4Address(number))
