"""The network section of a run's result."""

from typing import Final, Literal

import msgspec

ACCOUNT: Final = b"account"  # asks a gate for a NetworkUse, and is its answer (`gate_process`)


class Contact(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Connections or datagrams to one destination that had the same result.

    host: the name or address that the program asked for; empty for all further hosts of a rule, after 256 rows.
    port: the destination port; 0 if the host is empty, or if a name was only looked up.
    transport: TCP or UDP.
    rule: the id of the rule that decided.
    reason: why the connections were denied or failed; empty if they were made.
    address: the address that the gate connected to or would have connected to; empty if the name was not resolved.
    tls_name: the name in TLS or HTTP, if that name caused the decision.
    count: the number of connections or datagrams.
    sent_bytes: the number of bytes that the program sent.
    received_bytes: the number of bytes that the program received.
    """

    host: str
    port: int
    transport: Literal["tcp", "udp"]
    rule: str
    reason: str = ""
    address: str = ""
    tls_name: str = ""
    count: int = 1
    sent_bytes: int = 0
    received_bytes: int = 0


class NetworkUse(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All connections of a run.

    allowed: connections that were made.
    denied: connections that were denied.
    failed: connections that were allowed but failed, for example because the server refused them or they were idle.
    more: the number of denials that the list does not contain, because it is full.
    log_dropped: the number of lines that the log of connections does not contain, because of its limits.
    """

    allowed: list[Contact] = []
    denied: list[Contact] = []
    failed: list[Contact] = []
    more: int = 0
    log_dropped: int = 0
