"""The connections of a run: its gate, and what the gate has to say of them."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, Final

import msgspec

from x07_sandbox.errors import UsageError
from x07_sandbox.network.guest_view import guest_view
from x07_sandbox.network.names import parse_host
from x07_sandbox.network.processes import GateConfig, gate_running
from x07_sandbox.network.rules import Allowlist, Request, decide, make_allowlist
from x07_sandbox.network.settings import read_settings
from x07_sandbox.plan.denials import Denial
from x07_sandbox.runs.folder import NET_LOG

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from x07_sandbox.network.account import Contact, NetworkUse
    from x07_sandbox.network.processes import GateProcess
    from x07_sandbox.runs.request import InForce

_DENIALS_MAX: Final = 64
_LIKELY_PORT: Final = 443


class Egress(msgspec.Struct, frozen=True, kw_only=True):
    """What a run with connections needs before it starts. view: `network` of START."""

    allowlist: Allowlist
    config: GateConfig
    view: dict[str, Any]


def egress_of(in_force: InForce) -> Egress:
    """Read and check all that decides about a run's connections. Raises SandboxError."""
    settings = read_settings()
    allowlist = make_allowlist(in_force.policy, in_force.denied, settings)
    config = GateConfig(policy=in_force.data, denied=in_force.denied, settings=settings)
    return Egress(allowlist=allowlist, config=config, view=guest_view(allowlist))


@contextlib.contextmanager
def gate_of(egress: Egress, folder: Path) -> Iterator[GateProcess]:
    """Start the gate of a run, which logs to a file in *folder*. Raises HostError."""
    log_fd = os.open(folder / NET_LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with gate_running(egress.config, log_fd) as gate:
            yield gate
    finally:
        os.close(log_fd)


def denials(net: NetworkUse, allowlist: Allowlist) -> list[Denial]:
    """What the gate has refused, each with what would allow it."""
    return [_denial(contact, allowlist) for contact in net.denied[:_DENIALS_MAX]]


def _denial(contact: Contact, allowlist: Allowlist) -> Denial:
    if contact.rule == "frames":
        return Denial(
            field=contact.rule,
            action="break the protocol of the egress gate",
            subject=contact.reason,
            enforced_by="egress gate",
            observed_by="host",
            count=contact.count,
            how_to_allow=None,
        )
    how = None
    # A host that is not even a host has nothing that allows it; nor has one that the list allows.
    with contextlib.suppress(UsageError):
        port = contact.port or _LIKELY_PORT  # a name that was looked up has none
        request = Request(host=parse_host(contact.host), port=port, transport=contact.transport)
        how = decide(allowlist, request).how_to_allow
    where = f"{contact.host}:{contact.port}" if contact.port else contact.host
    return Denial(
        field=contact.rule,
        action="connect" if contact.port else "look up",
        subject=where if contact.transport == "tcp" else f"{where} ({contact.transport})",
        enforced_by="egress gate",
        observed_by="host",
        count=contact.count,
        how_to_allow=how,
    )
