"""Runs many cases against all servers at once, and finds those that reach a host that is not allowed."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tests.fuzz.differential.bench import HTTP2_PORTS, TLS_PORTS, Bench
from tests.fuzz.differential.case import Case, without_number
from tests.fuzz.differential.session import Passed, dry_run, play
from tests.fuzz.differential.tls import openssl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.fuzz.differential.evidence import Taken

_CONNECTIONS: Final = 150
_TLS_START: Final = b"\x16\x03"
_HTTP2_START: Final = b"PRI * HTTP/2"
_RECENT: Final = 5000
_UNKNOWN: Final = Case("not reproduced", "any", ())


@dataclass(frozen=True, slots=True)
class Finding:
    """A case that passed the gate, and that a server took for a request to another host."""

    case: Case
    taken: Taken
    passed: bytes

    def __str__(self) -> str:
        taken = f"{self.taken.server} took {self.taken.text!r} for {self.taken.hosts or 'no host'}"
        return f"{self.case.name}: {taken} {self.case.steps} passed as {self.passed!r}"


class Campaign:
    """Plays cases on a bench. gated: False to send all bytes to the servers, as a broken gate would.

    inputs: how many were played; stopped: those of which no byte passed. taken: requests that each server acted on.
    """

    def __init__(self, bench: Bench, *, gated: bool = True) -> None:
        self.bench = bench
        self.inputs = self.stopped = 0
        self.taken: Counter[str] = Counter()
        self._gated = gated
        self._free = asyncio.Semaphore(_CONNECTIONS)
        self._seen: set[int] = set()
        self._number = 0
        self._recent: dict[int, Case] = {}  # a slow server's evidence may come with that of a later round

    async def run(self, cases: Iterable[Case]) -> list[Finding]:
        """Play the cases at the same time, except those that pass the same bytes as an earlier one."""
        chosen: list[Case] = []
        for case in cases:
            self.inputs += 1
            silent = self._silent(case)
            if not silent.data:  # no server speaks before it has received bytes
                self.stopped += 1
            elif self._is_new(case, silent):
                chosen.append(case)
        return await self._round(chosen, frozenset())

    async def _round(self, cases: Sequence[Case], only: frozenset[str]) -> list[Finding]:
        """Play the cases at the same time, whether they are new or not. only: the servers to play on; empty for all."""
        numbered: dict[int, Case] = {}
        findings: list[Finding] = []
        for case in cases:
            self._number += 1
            numbered[self._number] = self._recent[self._number] = played = case.numbered(self._number)
            self._recent.pop(self._number - _RECENT, None)
            data = bytes(self._silent(played).data)
            if only <= {"openssl"} and (name := openssl(data)) is not None:
                self.taken[name.server] += 1
                # Clients of databases send no name, so that only TLS ports need one.
                allowed = name.allowed or (not name.hosts and case.mode == "any" and self._gated)
                findings += [] if allowed else [Finding(played, name, data)]
        connections = [self._connect(case, port) for case in numbered.values() for port in self._ports(case, only)]
        if not connections:
            return findings
        await asyncio.gather(*connections)
        return findings + await self._judge(numbered, only)

    async def _judge(self, numbered: dict[int, Case], only: frozenset[str]) -> list[Finding]:
        findings: list[Finding] = []
        unnumbered: dict[str, Taken] = {}
        for taken in await self.bench.evidence(only):
            self.taken[taken.server] += 1
            if taken.allowed:
                continue
            case = self._recent.get(taken.number or 0) or (
                next(iter(numbered.values())) if len(numbered) == 1 else None
            )
            if case is not None:
                findings.append(Finding(case, taken, bytes(self._silent(case).data)))
            else:
                unnumbered[taken.server] = taken
        if self._gated:
            for taken in unnumbered.values():
                findings += await self._search(taken, list(numbered.values()))
        return findings

    async def _search(self, taken: Taken, cases: list[Case]) -> list[Finding]:
        """Return the findings behind a request without a case's number, by playing ever fewer cases again."""
        half = len(cases) // 2
        found: list[Finding] = []
        for part in (cases[:half], cases[half:]):  # a round searches on if its cases include one that holds
            found += await self._round(part, frozenset({taken.server}))
        return found or [Finding(_UNKNOWN, taken, b"")]

    def _silent(self, case: Case) -> Passed:
        """Return what passes if the server stays silent."""
        return dry_run(case) if self._gated else Passed(bytearray(b"".join(filter(None, case.steps))))

    def _is_new(self, case: Case, silent: Passed) -> bool:
        """Return whether servers may take something from this case that they took from no other case."""
        if silent.rule or silent.waiting or None in case.steps:  # what passes depends on the server
            steps = tuple(step and without_number(step) for step in case.numbered(0).steps)
            key = hash((case.mode, steps, case.half_close))
        else:
            key = hash((without_number(bytes(silent.data)), case.half_close))
        if key in self._seen:
            return False
        self._seen.add(key)
        return True

    def _ports(self, case: Case, only: frozenset[str]) -> list[str]:
        """Return the servers to which a case matters."""
        data = b"".join(filter(None, case.steps))
        without: frozenset[str] = frozenset()
        without |= frozenset() if _TLS_START in data else TLS_PORTS
        without |= frozenset() if _HTTP2_START in data else HTTP2_PORTS
        return [name for name in self.bench.ports if name not in without and (not only or name in only)]

    async def _connect(self, case: Case, port: str) -> None:
        async with self._free:
            with contextlib.suppress(OSError):
                await play(case, self.bench.address, self.bench.ports[port], gated=self._gated)
