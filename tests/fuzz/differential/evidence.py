"""What a server took for a request: the evidence by which the fuzzer judges, never the answer that a client sees."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

_GOOD: Final = re.compile(r"good\.test\.?(?::0*80)?", re.IGNORECASE)
_ABSOLUTE: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/*([^/?#]*)")
_NUMBER: Final = re.compile(r"e([0-9]{7})\.evil\.test", re.IGNORECASE)
FENCE: Final = "fence-"
"""Start of the path or name of the requests that mark the end of a batch in each server's log."""
REFUSED: Final = frozenset({"400", "408", "414", "431", "494", "497", "499", "501", "505", "000", "0", "-"})
"""Status of requests that a server could not read, so that it did not act for any host."""
_TLS: Final = "TLS"
_PREFACE: Final = "PRI * HTTP"  # it names no host, and the frames behind it wait for an answer in HTTP/2
# What the servers log if a request has no host: nothing, or the name of their default virtual host.
_NO_HOST: Final = frozenset({"", "-", "_", "default.test"})


@dataclass(frozen=True, slots=True)
class Taken:
    """One request that a server acted on. hosts: every host that it may have acted for; empty if it names none."""

    server: str
    hosts: tuple[str, ...]
    text: str

    @property
    def allowed(self) -> bool:
        """Whether the request is for the listed host only. A request without a host goes to a server's default one."""
        return bool(self.hosts) and all(_GOOD.fullmatch(host) for host in self.hosts)

    @property
    def number(self) -> int | None:
        """The number of the case that sent the request, if it contains one."""
        found = _NUMBER.search(" ".join((*self.hosts, self.text)))
        return int(found[1]) if found else None


def taken(server: str, target: str, hosts: list[str], text: str) -> Taken:
    """Return the evidence of a request, from the target and the hosts that its server reports."""
    match = None if target.startswith("/") else _ABSOLUTE.match(target)
    return Taken(server, (match[1], *hosts) if match else tuple(hosts), text)


class Log:
    """The log of one program: lines of server, status, Host fields, host in effect and request line, with tabs."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._rest = b""

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self) -> list[Taken]:
        """Return the evidence written since the last call."""
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        return [found for line in lines if (found := _parse(line.decode("latin-1"))) is not None]


def _parse(line: str) -> Taken | None:
    server, status, named, effective, text = (line + "\t" * 4).split("\t")[:5]
    hosts = [host for host in (*named.split(","), effective) if host not in _NO_HOST]
    if text == _TLS:
        return Taken(server, tuple(hosts), text) if hosts else None
    if status in REFUSED or not text or text.startswith(_PREFACE):
        return None
    target = [*text.split(" "), ""][1]
    return taken(server, target, hosts, text)
