"""What a run's connections came to, as its result has it."""

from __future__ import annotations

from typing import Literal

import msgspec


class Contact(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Connections, or datagrams, that had one fate.

    rule: id of the rule that decided. reason: why they were denied, or did not come about; empty for the others.
    address: what was dialled, or would have been; empty where nothing was looked up. tls_name: what the program named
    in TLS or HTTP where that decided. count: how many. sent_bytes: from the program.
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
    """All that a gate saw. failed: what was allowed, and did not come about, since the far end refused it, say.

    more: connections beyond those that are listed here. log_dropped: lines that were left out of the log.
    """

    allowed: list[Contact] = []
    denied: list[Contact] = []
    failed: list[Contact] = []
    more: int = 0
    log_dropped: int = 0
