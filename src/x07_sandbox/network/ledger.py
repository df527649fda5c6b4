"""What a gate has decided and carried: counters for the result, and a line of JSON for each event.

Both are bounded, whatever a guest does: the counters in number, the lines in number a second and in bytes. Texts that
a guest chose are cut, and JSON escapes them.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from x07_sandbox.network.summary import Contact, NetworkUse

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS_MAX: Final = 256  # of each table; what more there was is counted
_TEXT_MAX: Final = 253
_REASON_MAX: Final = 500
_BURST: Final = 100
_LINES_S: Final = 20
LOG_MAX_BYTES: Final = 8 << 20


_Key = tuple[str, int, str, str, str, str, str]


class Ledger:
    """The account of one gate. now: seconds, from a clock that never goes back.

    write: takes each line, and says whether all of it was written. Refusals have a rate of their own, so that no flood
    of them keeps a connection out of the log.
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
        self._allowed: dict[_Key, list[int]] = {}
        self._denied: dict[_Key, list[int]] = {}
        self._failed: dict[_Key, list[int]] = {}
        self._more = 0

    def allowed(self, contact: Contact) -> list[int]:
        """Count a connection, and return its counters: connections, bytes sent, bytes received; add to these."""
        counters = self._count(self._allowed, contact)
        self._line("open", contact)
        return counters

    def denied(self, contact: Contact) -> None:
        """Count a refusal."""
        self._count(self._denied, contact)
        self._line("denied", contact)

    def failed(self, contact: Contact) -> None:
        """Count a connection that was allowed and did not come about."""
        self._count(self._failed, contact)
        self._line("failed", contact)

    def closed(self, contact: Contact, sent_bytes: int, received_bytes: int) -> None:
        """Log the end of a connection."""
        self._line("closed", contact, sent_bytes=sent_bytes, received_bytes=received_bytes)

    def use(self) -> NetworkUse:
        """Return the account; the log ends with it."""
        self._tell_dropped()
        return NetworkUse(
            allowed=_rows(self._allowed),
            denied=_rows(self._denied),
            failed=_rows(self._failed),
            more=self._more,
            log_dropped=self._dropped,
        )

    def _count(self, table: dict[_Key, list[int]], contact: Contact) -> list[int]:
        key = _key(contact)
        counters = table.get(key)
        if counters is None:
            # Names that were only looked up, which are cheap to make up, leave room for connections.
            if len(table) >= (ROWS_MAX if contact.port else ROWS_MAX // 2):
                self._more += 1
                return [0, 0, 0]
            counters = table[key] = [0, 0, 0]
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
        self._tell_dropped()
        host, port, transport, rule, reason, address, tls_name = _key(contact)
        said = {"host": host, "port": port, "transport": transport, "rule": rule}
        perhaps = {"reason": reason, "address": address, "tls_name": tls_name}
        said |= {key: value for key, value in perhaps.items() if value}
        self._put({"event": event, **said, **more})

    def _tell_dropped(self) -> None:
        if self._unwritten:
            self._put({"event": "dropped", "lines": self._unwritten})
            self._unwritten = 0

    def _put(self, said: dict[str, Any]) -> None:
        line = json.dumps({"ms": round((self._now() - self._began) * 1000), **said}).encode("ascii") + b"\n"
        self._bytes += len(line)
        self._dropped += not self._write(line)


def _key(contact: Contact) -> _Key:
    return (
        contact.host[:_TEXT_MAX],
        contact.port,
        contact.transport,
        contact.rule,
        contact.reason[:_REASON_MAX],
        contact.address,
        contact.tls_name[:_TEXT_MAX],
    )


def _rows(table: dict[_Key, list[int]]) -> list[Contact]:
    names = ("host", "port", "transport", "rule", "reason", "address", "tls_name")
    rows = []
    for key, (count, sent, received) in table.items():
        values: dict[str, Any] = dict(zip(names, key, strict=True))
        rows.append(Contact(**values, count=count, sent_bytes=sent, received_bytes=received))
    return rows
