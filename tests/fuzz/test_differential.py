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
    from collections.abc import Iterator

BATCH: Final = 300
BATCHES: Final = 1
FULL_S: Final = float(os.environ.get("X07_FUZZ_S", "300"))
PROXIES: Final = frozenset({"squid", "squid-proxy-line", "tinyproxy", "apache-proxy"})


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """The event loop of all servers."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def bench(runner: asyncio.Runner) -> Iterator[Bench]:
    """All servers, started once."""
    absent = ", ".join(program.name for program in PROGRAMS if not program.optional and not program.command())
    need(not absent, f"not installed: {absent}", installable=True)
    bench = Bench()
    runner.run(bench.__aenter__())
    try:
        yield bench
    finally:
        runner.run(bench.__aexit__(None, None, None))


def test_a_broken_gate_would_be_found(runner: asyncio.Runner, bench: Bench) -> None:
    """Without the gate, each server takes requests to other hosts, and each is found."""
    campaign = Campaign(bench, gated=False)
    found = " ".join(map(str, runner.run(campaign.run(CORPUS))))
    assert [name for name in (*bench.ports, "openssl") if f": {name} took" not in found] == []


def test_what_once_passed_is_refused(runner: asyncio.Runner, bench: Bench) -> None:
    """No input of the corpus reaches another host on any server, or on a listed proxy, however lax it is."""
    campaign = Campaign(bench)
    assert runner.run(campaign.run(CORPUS)) == []
    assert campaign.stopped > len(CORPUS) / 4


@pytest.mark.slow
@pytest.mark.timeout(FULL_S + 900)
def test_random_inputs_reach_no_other_host(runner: asyncio.Runner, bench: Bench) -> None:
    """No server takes the bytes that the gate lets out of a random connection for a request to another host."""
    campaign = Campaign(bench)
    end = time.monotonic() + (FULL_S if FULL else 0)
    seed = time.monotonic_ns() if FULL else 35
    inputs, batches = cases(seed), 0
    while batches < BATCHES or time.monotonic() < end:
        batches += 1
        found = runner.run(campaign.run(itertools.islice(inputs, BATCH)))
        assert found == [], f"seed {seed}: {'; '.join(map(str, found))}"
    assert campaign.stopped > campaign.inputs / 20
    # Proof that bytes have passed: every server has acted for the listed host. Most proxies need an absolute target,
    # which the gate never forwards.
    assert {name for name in bench.ports if not campaign.taken[name]} <= PROXIES | {"nginx-proxy-line"}
