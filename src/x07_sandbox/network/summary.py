"""The network section of a run's result."""

from typing import Literal

import msgspec


class Contact(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Connections or datagrams to one destination that had the same result.

    host: the name or address that the program asked for.
    port: the destination port.
    transport: TCP or UDP.
    rule: the id of the rule that decided.
    reason: why the connections were denied or failed; empty if they were made.
    address: the address that was dialled or would have been dialled; empty if nothing was resolved.
    tls_name: the name in TLS or HTTP, if that name caused the decision.
    count: the number of connections or datagrams.
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
    denied: connections that were denied.
    failed: connections that were allowed but failed, for example because the server refused them.
    more: the number of rows that were left out.
    log_dropped: the number of lines that were left out of the log.
    """

    allowed: list[Contact] = []
    denied: list[Contact] = []
    failed: list[Contact] = []
    more: int = 0
    log_dropped: int = 0
