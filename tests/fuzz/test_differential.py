"""The gate's inspection against real servers and proxies: nothing that passes is a request to another host."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from typing import TYPE_CHECKING, Final

import pytest

from tests.conftest import FULL, need
from tests.fuzz.differential.bench import Bench
from tests.fuzz.differential.campaign import Campaign
from tests.fuzz.differential.corpus import CORPUS
from tests.fuzz.differential.generate import cases
from tests.fuzz.differential.programs import PROGRAMS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tests.fuzz.differential.case import Case

BATCH: Final = 300
BATCHES: Final = 1
FULL_S: Final = float(os.environ.get("X07_FUZZ_S", "300"))
PROXIES: Final = frozenset({"squid", "squid-proxy-line", "tinyproxy", "apache-proxy"})


class Servers:
    """The running servers, and the event loop that drives them."""

    def __init__(self, runner: asyncio.Runner, bench: Bench) -> None:
        self._runner = runner
        self.bench = bench

    def play(self, campaign: Campaign, cases: Iterable[Case]) -> list[str]:
        """Play cases, and return the findings as text."""
        return [str(finding) for finding in self._runner.run(campaign.run(cases))]


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    """All servers, started once."""
    absent = ", ".join(program.name for program in PROGRAMS if not program.optional and not program.command())
    need(not absent, f"not installed: {absent}", installable=True)
    with asyncio.Runner() as runner:
        bench = Bench()
        runner.run(bench.__aenter__())
        try:
            yield Servers(runner, bench)
        finally:
            runner.run(bench.__aexit__(None, None, None))


def test_a_broken_gate_would_be_found(servers: Servers) -> None:
    """Without the gate, each server takes requests to other hosts, and each is found."""
    campaign = Campaign(servers.bench, gated=False)
    found = " ".join(servers.play(campaign, CORPUS))
    assert [name for name in (*servers.bench.ports, "openssl") if f": {name} took" not in found] == []


def test_what_once_passed_is_refused(servers: Servers) -> None:
    """No input of the corpus reaches another host on any server, or on a listed proxy, however lax it is."""
    campaign = Campaign(servers.bench)
    assert servers.play(campaign, CORPUS) == []
    assert campaign.stopped > len(CORPUS) / 4


@pytest.mark.slow
@pytest.mark.timeout(FULL_S + 900)
def test_random_inputs_reach_no_other_host(servers: Servers) -> None:
    """No server takes the bytes that the gate lets out of a random connection for a request to another host."""
    campaign = Campaign(servers.bench)
    end = time.monotonic() + (FULL_S if FULL else 0)
    seed = time.monotonic_ns() if FULL else 35
    inputs, batches = cases(seed), 0
    while batches < BATCHES or time.monotonic() < end:
        batches += 1
        assert servers.play(campaign, itertools.islice(inputs, BATCH)) == [], f"seed {seed}"
    assert campaign.stopped > campaign.inputs / 20
    # Proof that bytes have passed: every server has acted for the listed host. Most proxies need an absolute target,
    # which the gate never forwards.
    assert {name for name in servers.bench.ports if not campaign.taken[name]} <= PROXIES | {"nginx-proxy-line"}
