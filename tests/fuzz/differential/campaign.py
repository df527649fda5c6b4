"""Runs many cases against all servers at once, and finds those that reach a host that is not allowed."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from tests.fuzz.differential.bench import HTTP2_PORTS, TLS_PORTS, Bench
from tests.fuzz.differential.case import Case, Step, without_number
from tests.fuzz.differential.session import Passed, dry_run, play
from tests.fuzz.differential.tls import openssl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.fuzz.differential.evidence import Taken

_CONNECTIONS: Final = 150
_TLS_START: Final = b"\x16\x03"
_HTTP2_START: Final = b"PRI * HTTP/2"
_TRIALS_MAX: Final = 150
_RECENT: Final = 5000
_UNKNOWN: Final = Case("not reproduced", "any", ())


@dataclass(frozen=True, slots=True)
class Finding:
    """A case that passed the gate, and that a server took for a request to another host."""

    case: Case
    taken: Taken
    passed: bytes

    def __str__(self) -> str:
        return f"{self.case.name}: {self.taken.server} took {self.taken.text!r} for {self.taken.hosts or 'no host'}"


class Campaign:
    """Plays cases on a bench. gated: False to send all bytes to the servers, as a broken gate would.

    counts: inputs, those that were stopped before any byte passed, those that pass the same bytes as an earlier one,
    connections, bytes that passed. taken: requests that each server acted on.
    """

    def __init__(self, bench: Bench, *, gated: bool = True) -> None:
        self.bench = bench
        self.counts: Counter[str] = Counter()
        self.taken: Counter[str] = Counter()
        self._gated = gated
        self._free = asyncio.Semaphore(_CONNECTIONS)
        self._seen: set[int] = set()
        self._number = 0
        self._recent: dict[int, Case] = {}  # a slow server's evidence may come with that of a later round

    async def run(self, cases: Iterable[Case], *, only: frozenset[str] = frozenset()) -> list[Finding]:
        """Play the cases at the same time, and return the findings. only: the servers to play on; empty for all."""
        chosen: list[Case] = []
        for case in cases:
            self.counts["inputs"] += 1
            silent = self._silent(case)
            if not silent.data:  # no server speaks before it has received bytes
                self.counts["stopped"] += 1
            elif self._is_new(case, silent):
                chosen.append(case)
            else:
                self.counts["repeated"] += 1
        return await self._round(chosen, only)

    async def _round(self, cases: Sequence[Case], only: frozenset[str]) -> list[Finding]:
        """Play the cases at the same time, whether they are new or not."""
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
            self.counts["connections"] += 1
            try:
                passed = await play(case, self.bench.address, self.bench.ports[port], gated=self._gated)
            except OSError:
                self.counts["failed connections"] += 1
            else:
                self.counts["bytes passed"] += len(passed.data)

    async def reduce(self, finding: Finding) -> Finding:
        """Return a smaller case with the same kind of evidence from the same server."""
        if not finding.case.steps:
            return finding
        smallest, trials = finding, 0
        for separator in (None, b"\n", b" ", b""):
            pieces = _split(smallest.case, separator)
            size = max(1, len(pieces) // 2)
            while size:
                at = 0
                while at < len(pieces) and trials < _TRIALS_MAX:
                    trials += 1
                    fewer = pieces[:at] + pieces[at + size :]
                    again = await self._round([_joined(smallest.case, fewer)], frozenset({finding.taken.server}))
                    if again:
                        smallest, pieces = again[0], fewer
                    else:
                        at += size
                size //= 2
        return smallest


def _split(case: Case, separator: bytes | None) -> list[Step]:
    """Return the pieces of a case's steps: the steps, or smaller pieces with their separator; each byte for b""."""
    if separator is None:
        return list(case.steps)
    found: list[Step] = []
    for step in case.steps:
        if step is None:
            found.append(None)
        elif not separator:
            found += [step[at : at + 1] for at in range(len(step))]
        else:
            found += [piece + separator for piece in step.split(separator)]
            found[-1] = (found[-1] or b"")[: -len(separator)]
    return found


def _joined(case: Case, pieces: list[Step]) -> Case:
    """Return the case with the pieces between two pauses as one step."""
    steps: list[Step] = []
    for piece in pieces:
        last = steps[-1] if steps else None
        if piece is None or last is None:
            steps.append(piece)
        else:
            steps[-1] = last + piece
    return replace(case, steps=tuple(steps))
