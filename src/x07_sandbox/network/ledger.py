"""Ledger of a gate's decisions and traffic: counters for the result, and a log with one JSON line per event.

The number of counters and the rate and total size of log lines are limited, so a guest cannot flood them. Texts that a
guest chose are truncated, and escaped by JSON.
"""

import json
from collections.abc import Callable
from typing import Any, Final

from msgspec.structs import replace

from x07_sandbox.policy.denials import Contact, NetworkUse

STREAM: Final = b"stream"
ACCOUNT: Final = b"account"  # asks a gate for a NetworkUse, and is its answer (`gate`)
ROWS_MAX: Final = 256  # per table; further ones are counted
_TEXT_MAX: Final = 253
_REASON_MAX: Final = 500
_BURST: Final = 100
_LINES_S: Final = 20
LOG_MAX_BYTES: Final = 8 << 20

_Table = dict[Contact, list[int]]


class Ledger:
    """The ledger of one gate. now: a monotonic clock, in seconds.

    write: a function that takes a log line and returns whether it could write the line. Denials have their own rate
    limit, so that a flood of denials does not hide connections in the log.
    """

    def __init__(self, write: Callable[[bytes], bool], now: Callable[[], float]) -> None:
        self._write = write
        self._now = now
        self._began = now()
        self._tokens = {"denied": float(_BURST), "other": float(_BURST)}
        self._filled_at = self._began
        self._bytes = 0
        self._unwritten = 0  # since the last line
        self._dropped = 0
        self._allowed: _Table = {}
        self._denied: _Table = {}
        self._failed: _Table = {}
        self._more = 0

    def allowed(self, contact: Contact) -> list[int]:
        """Count a connection, and return its counters for the caller to update: connections, bytes sent, received."""
        counters = self._count(self._allowed, contact)
        self._line("open", contact)
        return counters

    def denied(self, contact: Contact) -> None:
        """Count a denial."""
        self._count(self._denied, contact)
        self._line("denied", contact)

    def failed(self, contact: Contact) -> None:
        """Count an allowed connection that could not be made."""
        self._count(self._failed, contact)
        self._line("failed", contact)

    def closed(self, contact: Contact, sent_bytes: int, received_bytes: int) -> None:
        """Log the end of a connection."""
        self._line("closed", contact, sent_bytes=sent_bytes, received_bytes=received_bytes)

    def use(self) -> NetworkUse:
        """Finish the log, and return the counters."""
        self._log_dropped()
        return NetworkUse(
            allowed=_rows(self._allowed),
            denied=_rows(self._denied),
            failed=_rows(self._failed),
            more=self._more,
            log_dropped=self._dropped,
        )

    def _count(self, table: _Table, contact: Contact) -> list[int]:
        key = _truncated(contact)
        # Mere lookups (port 0), which are cheap to invent, leave room for connections.
        if key not in table and len(table) >= (ROWS_MAX if contact.port else ROWS_MAX // 2):
            if table is self._denied:
                self._more += 1
                return [0, 0, 0]
            # Connections stay complete: the policy's rules, which a guest cannot invent, have one more row each.
            key = Contact(host="", port=0, transport=contact.transport, rule=contact.rule)
        counters = table.setdefault(key, [0, 0, 0])
        counters[0] += 1
        return counters

    def _line(self, event: str, contact: Contact, **more: int) -> None:
        now = self._now()
        for kind, tokens in self._tokens.items():
            self._tokens[kind] = min(_BURST, tokens + (now - self._filled_at) * _LINES_S)
        self._filled_at = now
        kind = "denied" if event == "denied" else "other"
        if self._tokens[kind] < 1 or self._bytes > LOG_MAX_BYTES:
            self._unwritten += 1
            self._dropped += 1
            return
        self._tokens[kind] -= 1
        self._log_dropped()
        key = _truncated(contact)
        fields = {"event": event, "host": key.host, "port": key.port, "transport": key.transport, "rule": key.rule}
        optional = {"reason": key.reason, "address": key.address, "tls_name": key.tls_name}
        self._put({**fields, **{name: value for name, value in optional.items() if value}, **more})

    def _log_dropped(self) -> None:
        if self._unwritten:
            self._put({"event": "dropped", "lines": self._unwritten})
            self._unwritten = 0

    def _put(self, fields: dict[str, Any]) -> None:
        line = json.dumps({"ms": round((self._now() - self._began) * 1000), **fields}).encode("ascii") + b"\n"
        self._bytes += len(line)
        self._dropped += not self._write(line)


def _truncated(contact: Contact) -> Contact:
    return replace(
        contact,
        host=contact.host[:_TEXT_MAX],
        reason=contact.reason[:_REASON_MAX],
        tls_name=contact.tls_name[:_TEXT_MAX],
    )


def _rows(table: _Table) -> list[Contact]:
    return [
        replace(key, count=count, sent_bytes=sent, received_bytes=received)
        for key, (count, sent, received) in table.items()
    ]
