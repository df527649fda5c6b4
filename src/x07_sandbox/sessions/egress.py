"""The network connections of a run: the egress gate and the denials that it reports."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec.structs import replace

from x07_sandbox.channel.messages import Network
from x07_sandbox.errors import UsageError
from x07_sandbox.network.hosts import matches, parse_guest_host, parse_host
from x07_sandbox.network.processes import GateConfig, GateProcess, gate_running
from x07_sandbox.network.rules import (
    Allowlist,
    NetSettings,
    Request,
    advise_setting,
    decide,
    endpoint_text,
    guest_view,
    make_allowlist,
)
from x07_sandbox.network.settings import LIMITS, read_settings
from x07_sandbox.policy.denials import Contact, Denial, HowToAllow, NetworkUse
from x07_sandbox.policy.hints import hosts_in
from x07_sandbox.policy.hosts import split_port
from x07_sandbox.policy.observed import NETWORK
from x07_sandbox.records.runs import NET_LOG

if TYPE_CHECKING:
    from x07_sandbox.channel.messages import Denied
    from x07_sandbox.policy.model import EffectivePolicy

_DENIALS_MAX: Final = 64
# Hosts from which others serve their files, so that one of the two is of little use alone.
FILES_OF: Final = {
    "files.pythonhosted.org": "pypi.org",
    "static.crates.io": "index.crates.io",
    "codeload.github.com": "github.com",
    "objects.githubusercontent.com": "github.com",
    "release-assets.githubusercontent.com": "github.com",
}
_LIKELY_PORT: Final = 443


class Egress(msgspec.Struct, frozen=True, kw_only=True):
    """The data that a run with network access needs before it starts. view: the configuration of the relay."""

    allowlist: Allowlist
    config: GateConfig
    view: Network


def egress_of(effective_policy: EffectivePolicy) -> Egress:
    """Check and return the network settings of a run with this policy. Raises SandboxError."""
    settings = read_settings()
    allowlist = make_allowlist(effective_policy.policy, effective_policy.denied, settings)
    config = GateConfig(policy=effective_policy.data, denied=effective_policy.denied, settings=settings)
    return Egress(allowlist=allowlist, config=config, view=guest_view(allowlist))


@contextlib.contextmanager
def gate_of(egress: Egress, folder: Path) -> Iterator[GateProcess]:
    """Start the egress gate of a run, with a log file in *folder*, and end it with the context. Raises HostError."""
    log_fd = os.open(folder / NET_LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with gate_running(egress.config, log_fd) as gate:
            yield gate
    finally:
        os.close(log_fd)


def denials(net: NetworkUse, allowlist: Allowlist, text: str = "") -> tuple[list[Denial], int]:
    """Return the denials that the gate reported, connections before look-ups, and the number of unlisted denials.

    text: the program's error output, which may name the port of a host that was only looked up.
    """
    ports = dict(hosts_in(text, nearby=True))
    found = sorted(net.denied, key=lambda contact: contact.port == 0)
    more = len(found[_DENIALS_MAX:]) + net.more
    return [_denial(contact, allowlist, ports) for contact in found[:_DENIALS_MAX]], more


def denials_without_gate(
    refused: Iterable[Denied], effective_policy: EffectivePolicy, boundary: str, text: str = ""
) -> list[Denial]:
    """Return what the guest reported about connections, where there is no gate. boundary: what denied them."""
    contacts = [one for one in map(_contact, refused) if one is not None]
    if not contacts:
        return []
    settings = NetSettings()
    with contextlib.suppress(UsageError):  # a program that cannot connect runs in spite of bad settings
        settings = read_settings()
    allowlist = make_allowlist(effective_policy.policy, effective_policy.denied, settings)
    decisions = [decide(allowlist, _request(one, _LIKELY_PORT)) for one in contacts]
    rows = [replace(row, rule=one.rule, reason=one.reason) for row, one in zip(contacts, decisions, strict=True)]
    found, _ = denials(NetworkUse(denied=rows), allowlist, text)
    return [replace(one, enforced_by=boundary, observed_by="guest") for one in found]


def new_denials(net: NetworkUse, before: NetworkUse) -> NetworkUse:
    """Return the denials of *net* that *before*, an earlier account of the same gate, does not have."""
    counted = {_key(row): row.count for row in before.denied}
    rows = [replace(row, count=row.count - counted.get(_key(row), 0)) for row in net.denied]
    return NetworkUse(denied=[row for row in rows if row.count > 0], more=net.more - before.more)


def joined(uses: Iterable[NetworkUse]) -> NetworkUse:
    """Return the account of several gates together."""
    found = NetworkUse()
    for use in uses:
        lists = {
            name: _summed([*getattr(found, name), *getattr(use, name)]) for name in ("allowed", "denied", "failed")
        }
        found = replace(use, **lists, more=found.more + use.more, log_dropped=found.log_dropped + use.log_dropped)
    return found


def _summed(rows: list[Contact]) -> list[Contact]:
    total: dict[Contact, Contact] = {}
    for row in rows:
        before = total.get(_key(row), _key(row))
        counts = {
            name: getattr(before, name) + getattr(row, name) for name in ("count", "sent_bytes", "received_bytes")
        }
        total[_key(row)] = replace(row, **counts)
    return [*total.values()]


def _key(contact: Contact) -> Contact:
    return replace(contact, count=0, sent_bytes=0, received_bytes=0)


def _contact(denied: Denied) -> Contact | None:
    """Return a contact that the guest reported, without its rule, or None if it is about something else, or invalid."""
    if denied.by != NETWORK:
        return None
    try:
        host, port = split_port(denied.path) if denied.call == "connect" else (denied.path, 0)
        name = str(parse_guest_host(host.strip("[]").encode()))
        return Contact(host=name, port=port, transport="tcp", rule="", count=denied.times)
    except UsageError:
        return None


def _request(contact: Contact, likely_port: int) -> Request:
    return Request(host=parse_host(contact.host), port=contact.port or likely_port, transport=contact.transport)


def _denial(contact: Contact, allowlist: Allowlist, ports: Mapping[str, int]) -> Denial:
    where = endpoint_text(contact.host, contact.port) if contact.port else contact.host
    action, subject = "connect", where if contact.transport == "tcp" else f"{where} ({contact.transport})"
    if contact.rule == "frames":
        action, subject = "break", "the protocol of the egress gate"
    elif not contact.port:
        action = "look up"
    return Denial(
        field=contact.rule,
        action=action,
        subject=subject,
        enforced_by="egress gate",
        observed_by="host",
        count=contact.count,
        how_to_allow=_how(contact, allowlist, ports.get(contact.host, _LIKELY_PORT)),
        reason=_belongs_to(contact, allowlist) or ("" if contact.rule.startswith("net.") else contact.reason),
    )


def _belongs_to(contact: Contact, allowlist: Allowlist) -> str:
    """Return that the host serves the files of a granted one, or ""."""
    other = FILES_OF.get(contact.host, "")
    granted = other and any(matches(entry.what, other) for entry in allowlist.entries)
    return f"{other}, which is granted, serves its files from this host" if granted else ""


def _how(contact: Contact, allowlist: Allowlist, likely_port: int) -> HowToAllow | None:
    kind, _, what = contact.rule.partition(":")
    if contact.rule in {"http:other-host", "tls:other-name"}:
        return None  # the program must connect to this host itself
    if kind in {"tls", "http", "first-bytes", "udp-443"}:
        ports = sorted(allowlist.settings.opaque_ports | {contact.port})
        return HowToAllow(json_path=None, value=None, setting=f"opaque_ports = {ports}")
    if kind == "limit" and what and getattr(allowlist.settings, what) < (most := LIMITS[what][1]):
        return HowToAllow(json_path=None, value=None, setting=f"{what} = {most}")
    # No setting allows an invalid host or one that is already in the list.
    with contextlib.suppress(UsageError):
        asked = replace(contact, host=contact.tls_name) if contact.rule == "name:denied" else contact
        request = _request(asked, likely_port)  # a lookup has no port
        if kind in {"deny-floor", "local-name"} and contact.address:  # the listed name resolved to a special address
            resolved = advise_setting(allowlist, replace(request, host=parse_host(contact.address)))
            return resolved and HowToAllow(json_path=None, value=None, setting=resolved.setting)
        return decide(allowlist, request).how_to_allow
    return None
