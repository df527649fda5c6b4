"""Decisions on connections: an allowlist made from policy and denials, its evaluation, and what the guest gets. No I/O.

Each connection is decided twice. `decide` checks its name or address when the program requests the connection.
`decide_address` checks each address to which the name resolves. The checks run in this order, and the first denial
counts:

1. special names and addresses (hosts.py), unless the user's settings allow them, and QUIC;
2. ``--deny-host``;
3. the switches of ``net``;
4. the allowlist: names match names, addresses match addresses, and the ports of all matching entries count.

`guest_view` is the configuration of the guest's relay: synthetic addresses for names, and allowed addresses and ports.
The host computes it, because it normalizes names (hosts.py). The guest's rules are a second line of defence: the gate
decides again on every connection.
"""

import json
import shlex
from collections.abc import Collection, Iterator, Mapping
from ipaddress import IPv4Address, IPv6Address
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
from msgspec.structs import replace

from x07_sandbox.channel.messages import Network
from x07_sandbox.errors import UsageError, printable
from x07_sandbox.network.hosts import (
    ALLOWED_BY,
    HOST_ADDRESS,
    HOST_NAME,
    Address,
    Host,
    Pattern,
    Wildcard,
    embedded_ipv4,
    kind_of,
    matches,
    parse_host,
    parse_pattern,
    pattern_text,
    special,
    special_within,
    unmapped,
)
from x07_sandbox.policy.denials import HowToAllow
from x07_sandbox.policy.hosts import Addresses, covers, split_port
from x07_sandbox.policy.model import Policy, PolicyError, Problem
from x07_sandbox.policy.observed import advise

Transport = Literal["tcp", "udp"]
DeniedHosts = Mapping[str, Collection[int] | None]
_QUIC: Final = 443
_FIRST_NAME: Final = 16
_FIRST_BLOCK: Final = 4 * 256
_BLOCK: Final = 256
_V4: Final = 4
_SYNTHETIC: Final = Addresses(_V4, 0xC6120000, 0xC613FFFF)  # 198.18.0.0/15
_ELSEWHERE: Final = Addresses(_V4, 0xF0000000, 0xF001FFFF)  # 240.0.0.0/15, if the program may reach some of the other
# Addresses of guest/firewall, 192.0.0.8 and fd78:3037::1, and their neighbours, which the guest must refuse.
_OWN: Final = (Addresses(_V4, 0xC0000008, 0xC0000009), Addresses(6, 0xFD783037 << 96, (0xFD783037 << 96) + 1))


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A connection request of a program. host: in normal form (network/hosts)."""

    host: Host
    port: int
    transport: Transport = "tcp"

    def __str__(self) -> str:
        """Return the request in the form that ``--allow-host`` takes."""
        return endpoint_text(str(self.host), self.port)


def endpoint_text(host: str, port: int) -> str:
    """Return host and port as one text, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """An allowlist entry. rule, ports_rule: the policy fields of its host and ports. udp: whether UDP is allowed."""

    rule: str
    ports_rule: str
    what: Pattern
    ports: frozenset[int]
    udp: bool


class Denied(msgspec.Struct, frozen=True):
    """A ``--deny-host`` entry. ports: the denied ports; None for all."""

    what: Pattern
    ports: frozenset[int] | None


class Proxy(msgspec.Struct, frozen=True, kw_only=True):
    """The user's HTTP proxy. authorization: for its header, or "". resolves: whether the proxy resolves all names."""

    host: Host
    port: int
    authorization: str = ""
    resolves: bool = False

    def __repr__(self) -> str:
        """Return a text without the password."""
        return f"Proxy({self.host}:{self.port})"


class NetSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Exceptions in the user's settings. allow_local, allow_special: with a port. opaque_ports: not inspected.

    proxy: makes all connections. ca: a file with certificates that programs trust too. The others are the limits of
    one run (settings.LIMITS).
    """

    allow_local: frozenset[tuple[Addresses, int]] = frozenset()
    allow_special: frozenset[tuple[Addresses, int]] = frozenset()
    opaque_ports: frozenset[int] = frozenset()
    proxy: Proxy | None = None
    ca: Path | None = None
    max_connections: int = 256
    connections_per_second: int = 100
    max_pending: int = 128
    idle_seconds: int = 3600

    def lists(self, address: Address, port: int) -> bool:
        """Return whether allow_local has an entry for this one address."""
        return (Addresses(address.version, int(address), int(address)), port) in self.allow_local

    def allows(self, address: Address, port: int) -> bool:
        """Return whether the settings allow a special address. A network does not allow loopback and metadata."""
        by = ALLOWED_BY.get(kind_of(address)[0])
        found = {"allow_local": self.allow_local, "allow_special": self.allow_special}.get(by or "", ())
        return self.lists(address, port) or any(port == one and matches(what, address) for what, one in found)

    @property
    def proxy_resolves(self) -> bool:
        """Whether the proxy gets names."""
        return self.proxy is not None and self.proxy.resolves

    def resolves(self, host: Host) -> bool:
        """Return whether the proxy gets this host as a name, so that its addresses cannot be checked here."""
        return self.proxy_resolves and isinstance(host, str) and special(host) is None


class Allowlist(msgspec.Struct, frozen=True, kw_only=True):
    """All data that a decision needs. entries: exact names and addresses first, then wildcards."""

    policy: Policy
    entries: tuple[Entry, ...]
    denied: tuple[Denied, ...]
    settings: NetSettings = NetSettings()


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """The decision on a request. rule: a stable id. reason: a sentence without full stop.

    how_to_allow: advice for a denied request; None if the request is allowed, or if nothing can allow it.
    """

    request: Request
    allowed: bool
    rule: str
    reason: str
    how_to_allow: HowToAllow | None = None


def parse_request(text: str, transport: Transport = "tcp") -> Request:
    """Parse ``HOST:PORT``, with an IPv6 address in brackets. Raises UsageError for any other text."""
    host, port = split_port(text)
    return Request(host=parse_host(host), port=port, transport=transport)


def make_allowlist(policy: Policy, denied: DeniedHosts | None = None, settings: NetSettings | None = None) -> Allowlist:
    """Return the allowlist of a policy. denied: the ports that ``--deny-host`` denies, by host; None means all ports.

    Raises PolicyError with all invalid hosts of the policy, or UsageError for an invalid denial.
    """
    problems: list[Problem] = []
    entries = sorted(_entries(policy, problems), key=lambda entry: isinstance(entry.what, Wildcard))
    if problems:
        raise PolicyError.of(policy.policy_id, problems, in_schema=True)
    return Allowlist(
        policy=policy,
        entries=tuple(entries),
        denied=tuple(
            Denied(parse_pattern(host), None if ports is None else frozenset(ports))
            for host, ports in (denied or {}).items()
        ),
        settings=settings or NetSettings(),
    )


def decide(allowlist: Allowlist, request: Request) -> Decision:
    """Decide on a connection request. Before a name's addresses are dialled, `decide_address` checks each of them."""
    blocked = _special(allowlist, request) or _denial(allowlist, request) or _switch(allowlist, request)
    return blocked or _listed(allowlist, request)


def decide_address(allowlist: Allowlist, decision: Decision, address: Address) -> Decision:
    """Decide on an address to which the name of an allowed *decision* resolved. A denial is returned as it is.

    The address needs no allowlist entry of its own, because its name is listed.
    """
    if not decision.allowed:
        return decision
    asked = decision.request
    as_given = replace(asked, host=unmapped(address))
    by_address = replace(as_given, host=next(iter(embedded_ipv4(address, ())), as_given.host))
    if isinstance(asked.host, str) and (local := special(asked.host)) and not _opened(allowlist, by_address):
        return _denied(asked, *local)
    denial = _special(allowlist, by_address) or _denial(allowlist, by_address) or _denial(allowlist, as_given)
    if denial:
        return replace(denial, request=asked, reason=f"{asked.host} resolves to {address}, and {denial.reason}")
    return decision


def unreachable_entries(allowlist: Allowlist) -> Iterator[tuple[Entry, str]]:
    """Yield each entry of which at least a part is unreachable, and the reason as a clause."""
    for entry in allowlist.entries:
        if isinstance(entry.what, Addresses) and entry.what.first != entry.what.last:
            if found := special_within(entry.what):
                more = f", and {len(found) - 1} more like it" if len(found) > 1 else ""
                yield entry, f"{found[0]}{more}"
        elif not isinstance(entry.what, Wildcard):
            host = parse_host(pattern_text(entry.what))
            requests = [Request(host=host, port=port) for port in sorted(entry.ports)]
            denied = [one for one in (_special(allowlist, request) for request in requests) if one is not None]
            for decision in denied[:1]:
                setting = decision.how_to_allow and decision.how_to_allow.setting
                yield entry, f"{decision.reason}; to allow it, set {setting}" if setting else decision.reason


def denied_name(allowlist: Allowlist, name: str, port: int) -> str | None:
    """Return why a name in the first bytes of a connection to an address is denied, or None if it is listed too."""
    decision = decide(allowlist, Request(host=name, port=port))
    return None if decision.allowed else decision.reason


def _special(allowlist: Allowlist, request: Request) -> Decision | None:
    if (found := special(request.host)) is not None and not _opened(allowlist, request):
        own = not isinstance(request.host, str) and request.host.is_loopback  # that of the program
        return _denied(request, *found, None if own else advise_setting(allowlist, request))
    if request.transport == "udp" and allowlist.settings.proxy is not None:
        return _denied(request, "proxy:udp", "the proxy in your settings carries no UDP")
    if request.transport == "udp" and request.port == _QUIC and _QUIC not in allowlist.settings.opaque_ports:
        return _denied(request, "udp-443", "UDP port 443 is QUIC, which hides the server name")
    return None


def _opened(allowlist: Allowlist, request: Request) -> bool:
    """Return whether the user's settings allow the requested special host.

    A special name is allowed if the settings list any address with the requested port. `decide_address` later checks
    the addresses to which the name resolves.
    """
    settings, host = allowlist.settings, _meant(request.host)
    if isinstance(host, str):
        return any(port == request.port for _, port in settings.allow_local | settings.allow_special)
    return settings.allows(host, request.port)


def advise_setting(allowlist: Allowlist, request: Request) -> HowToAllow | None:
    """Return the advice to allow a special host in the settings, and in the policy if it is not listed there."""
    if not (setting := _setting(allowlist.settings, request)):
        return None
    found = _switch(allowlist, request) or _listed(allowlist, request)
    return replace(found.how_to_allow or HowToAllow(json_path=None, value=None), setting=setting)


def _setting(settings: NetSettings, request: Request) -> str:
    """Return the lines of the settings that would allow a special host, or "" if none can."""
    host = _meant(request.host)
    if isinstance(host, str):  # not resolved yet
        if f".{host}".endswith((".localhost", ".onion")):
            return ""
        return f'allow_local = ["ADDRESS:{request.port}"] with the address of {host}'
    by = ALLOWED_BY.get(kind_of(host)[0], "")
    if not by:
        return ""
    key = by if by == "allow_special" else "allow_local"
    listed = settings.allow_special if by == "allow_special" else settings.allow_local
    line = f"{key} = {json.dumps([*opened_texts(listed), str(replace(request, host=host))])}"
    return line if key == by else f"{by} = true and {line}"


def opened_texts(opened: Collection[tuple[Addresses, int]]) -> list[str]:
    """Return the entries of allow_local or allow_special as texts."""
    return sorted(endpoint_text(pattern_text(what), port) for what, port in opened)


def _meant(host: Host) -> Host:
    return HOST_ADDRESS if host == HOST_NAME else host


def _denial(allowlist: Allowlist, request: Request) -> Decision | None:
    for denied in allowlist.denied:
        if matches(denied.what, request.host) and (denied.ports is None or request.port in denied.ports):
            what = pattern_text(denied.what)
            return _denied(request, f"deny-host:{what}", f"{what} is denied by --deny-host")
    return None


def _switch(allowlist: Allowlist, request: Request) -> Decision | None:
    """Return a denial if a switch of ``net`` excludes the request, else None."""
    policy = allowlist.policy
    net = policy.net
    for name, on in (
        ("enabled", net.enabled),
        (f"allow_{request.transport}", net.allow_tcp if request.transport == "tcp" else net.allow_udp),
        ("allow_dns", net.allow_dns or not isinstance(request.host, str)),
    ):
        if not on:
            how = advise(policy, f"net.{name}", value=True)
            return _denied(request, f"net.{name}", f"net.{name} is false in policy {policy.policy_id}", how)
    return None


def _listed(allowlist: Allowlist, request: Request) -> Decision:
    """Return the decision of the allowlist on the request."""
    found = [
        entry
        for entry in allowlist.entries
        if matches(entry.what, request.host) and (entry.udp or request.transport == "tcp")
    ]
    for entry in found:
        if request.port in entry.ports:
            reason = f"{pattern_text(entry.what)} is listed with port {request.port}"
            return Decision(request=request, allowed=True, rule=entry.rule, reason=reason)
    how = _advise_listing(allowlist.policy, request)
    if not found:
        return _denied(request, "net.allow_hosts", f"no entry lists {request.host}", how)
    ports = ", ".join(map(str, sorted(frozenset().union(*(entry.ports for entry in found))))) or "none"
    reason = f"{request.host} is listed, but not with port {request.port} (only {ports})"
    return _denied(request, found[0].ports_rule, reason, how)


def _denied(request: Request, rule: str, reason: str, how: HowToAllow | None = None) -> Decision:
    return Decision(request=request, allowed=False, rule=rule, reason=reason, how_to_allow=how)


def _advise_listing(policy: Policy, request: Request) -> HowToAllow | None:
    """Return the advice to list the request. The flag helps only if allow_tcp is true."""
    listed = [{"host": entry.host, "ports": list(entry.ports)} for entry in policy.net.allow_hosts]
    more = {"host": str(request.host), "ports": [request.port]}
    words = shlex.quote(str(request))  # a name may start like an option
    flag = f"--allow-host{'=' if words.startswith('-') else ' '}{words}" if policy.net.allow_tcp else None
    return advise(policy, "net.allow_hosts", [*listed, more], flag)


def _entries(policy: Policy, problems: list[Problem]) -> Iterator[Entry]:
    """Yield all entries in the policy's order. Append invalid hosts to *problems*."""
    net = policy.net
    if not net.enabled:
        return
    rows = [
        (f"net.allow_hosts[{index}]", f"net.allow_hosts[{index}].ports", entry.host, entry.ports)
        for index, entry in enumerate(net.allow_hosts)
    ]
    if (servers := policy.database_servers) is not None:
        for name, hosts in (("allow_dns", servers.allow_dns), ("allow_cidrs", servers.allow_cidrs)):
            for index, host in enumerate(hosts):
                rows.append((f"db.net.{name}[{index}]", "db.net.allow_ports", host, servers.allow_ports))
    for rule, ports_rule, host, ports in rows:
        try:
            what = parse_pattern(host)
        except UsageError as exc:
            problems.append(Problem(f"$.{rule}", f"has the invalid host {printable(host)} ({exc.why}). {exc.fix}"))
        else:
            of_net = rule.startswith("net.")
            yield Entry(rule=rule, ports_rule=ports_rule, what=what, ports=frozenset(ports), udp=of_net)


# for the guest


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
        ranges = _guest_ranges(entry, reserved)
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
        names={name: _address_text(address) for name, address in exact.items()},
        wildcards=[[suffix, _address_text(first)] for suffix, first in blocks.items()],
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
                yield [_address_text(first, version), _address_text(end - 1, version), sorted(ports)]


def _guest_ranges(entry: Entry, reserved: Addresses) -> list[Addresses]:
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


def _address_text(number: int, version: int = 4) -> str:
    return str(IPv4Address(number) if version == _V4 else IPv6Address(number))
