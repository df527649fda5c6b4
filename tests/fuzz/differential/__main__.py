"""Runs the differential fuzzer: python -m tests.fuzz.differential --seconds 3600. See CONTRIBUTING.md."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import resource
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.fuzz.differential.bench import Bench
from tests.fuzz.differential.campaign import Campaign, Finding
from tests.fuzz.differential.case import load
from tests.fuzz.differential.corpus import CORPUS
from tests.fuzz.differential.generate import cases

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fuzz.differential.case import Case

_BATCH: Final = 300
_REPORT_S: Final = 10.0
_REDUCED_MAX: Final = 5
"""Findings of one server that are reduced. Reducing one takes half a minute."""


def main() -> int:
    """Fuzz, or replay files. Return 1 if there is a finding."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.differential", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to fuzz (default: 60)")
    parser.add_argument("--seed", type=int, default=1, help="the first seed (default: 1)")
    parser.add_argument("--findings", type=Path, default=Path("findings"), help="folder for findings")
    parser.add_argument("--ungated", action="store_true", help="replay without the gate")
    parser.add_argument("--replay", type=Path, nargs="+", default=[], metavar="FILE", help="play findings again")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C, and removes the servers' folder
    # Each batch has some hundred connections at a time.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    if given.replay:
        return asyncio.run(_replay([load(path) for path in given.replay], gated=not given.ungated))
    return asyncio.run(_fuzz(given.seconds, given.seed, given.findings))


async def _replay(again: list[Case], *, gated: bool) -> int:
    async with Bench() as bench:
        found: list[Finding] = []
        for case in again:
            found += await Campaign(bench, gated=gated).run([case])
    for finding in found:
        _say(str(finding))
    return 1 if found else 0


async def _fuzz(seconds: float, seed: int, folder: Path) -> int:
    end = time.monotonic() + seconds
    inputs: Iterator[Case] = itertools.chain(CORPUS, cases(seed))
    total = 0
    while time.monotonic() < end:
        try:
            async with Bench() as bench:
                campaign = Campaign(bench)
                _say(f"seed {seed}; {len(bench.ports)} servers of {len(bench.programs)} programs, and OpenSSL")
                total += await _campaign(campaign, inputs, end, folder)
        except (OSError, TimeoutError) as exc:  # a server has crashed or hangs: go on with new ones
            _say(f"restarting the servers: {exc!r}")
    return 1 if total else 0


async def _campaign(campaign: Campaign, inputs: Iterator[Case], end: float, folder: Path) -> int:
    """Play batches until *end*. Return the number of findings."""
    started, reported, found = time.monotonic(), 0.0, 0
    reduced: dict[str, int] = {}
    while (now := time.monotonic()) < end:
        if now - reported > _REPORT_S:
            reported = now
            _report(campaign, now - started, found)
        for finding in await campaign.run(itertools.islice(inputs, _BATCH)):
            found += 1
            count = reduced[finding.taken.server] = reduced.get(finding.taken.server, 0) + 1
            smaller = await campaign.reduce(finding) if count <= _REDUCED_MAX else finding
            path = folder / f"{finding.taken.server}-{count}.json"
            _save(smaller, path)
            _say(f"FINDING {path}: {smaller}")
    _report(campaign, time.monotonic() - started, found)
    return found


def _report(campaign: Campaign, seconds: float, found: int) -> None:
    counts = ", ".join(f"{count} {name}" for name, count in campaign.counts.items())
    _say(f"{seconds:.0f} s: {counts}, {sum(campaign.taken.values())} requests taken, {found} findings")


def _save(finding: Finding, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    passed = finding.passed.decode("latin-1")
    finding.case.save(path, server=finding.taken.server, taken=finding.taken.text, passed=passed)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
