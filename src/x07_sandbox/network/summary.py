"""The network section of a run's result."""

from typing import Literal

import msgspec


class Contact(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Connections, or datagrams, to one place that had the same fate.

    host: the name or address that the program asked for.
    port: the port.
    transport: TCP or UDP.
    rule: the id of the rule that decided.
    reason: why they were denied or failed; empty for the others.
    address: the address that was dialed or would have been; empty if nothing was resolved.
    tls_name: the name in TLS or HTTP, if that decided.
    count: how many.
    sent_bytes: bytes from the program.
    received_bytes: bytes to the program.
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
    denied: connections that were refused.
    failed: connections that were allowed and failed, because the far end refused them, for example.
    more: how many more rows there were.
    log_dropped: how many lines were left out of the log.
    """

    allowed: list[Contact] = []
    denied: list[Contact] = []
    failed: list[Contact] = []
    more: int = 0
    log_dropped: int = 0
