"""The network section of a run's result."""

from typing import Literal

import msgspec


class Contact(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Connections, or datagrams, with the same outcome.

    rule: id of the rule that decided. reason: why they were denied or failed; else empty. address: the dialled or
    resolved address; empty if nothing was resolved. tls_name: the name in TLS or HTTP, if that decided.
    sent_bytes: from the program.
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
    """Everything that a gate recorded. failed: allowed connections that could not be made.

    more: connections that are not listed here. log_dropped: lines that are missing from the log.
    """

    allowed: list[Contact] = []
    denied: list[Contact] = []
    failed: list[Contact] = []
    more: int = 0
    log_dropped: int = 0
