"""Attacks by root of a guest on the real egress gate; the laboratory's log decides what was reached."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import sample
from tests.lab.attacks.rows import (
    ENDS_RELAY,
    FRAME_ROWS,
    REDIS_PING,
    STACK_LISTS,
    STACK_NAMES,
    STACK_ROWS,
    VIOLATIONS,
    Row,
    described,
    packets_of,
    reached,
)
from tests.lab.attacks.session import Seen, Session, Stage
from tests.lab.laboratory import SITE, Laboratory
from tests.vm.conftest import cache_with_base

if TYPE_CHECKING:
    from tests.lab.laboratory import Script

pytestmark = [pytest.mark.vm, pytest.mark.root, pytest.mark.network]

DENIED = ("denied.lab.example:*",)
MEMORY_MAX = 160 << 20
"""Peak memory of a gate in bytes, whatever its guest does."""


@pytest.fixture(scope="module")
def stage(lab: Laboratory, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """The laboratory, and an image whose programs are root of the guest."""
    folder = tmp_path_factory.mktemp("attacks")
    folder.chmod(0o700)
    made = Stage(lab=lab, folder=folder, cache=cache_with_base(folder / "lost-cache"))
    made.prepare()
    return made


def lists_of(rows: Sequence[Row]) -> dict[str, list[int]]:
    """Return the hosts and ports that the rows' policy lists."""
    lists: dict[str, list[int]] = {}
    for row in rows:
        for host, ports in row.lists.items():
            lists[host] = sorted({*lists.get(host, ()), *ports})
    return lists


def names_of(rows: Sequence[Row]) -> dict[str, Script | None]:
    """Return the names that the rows need in the laboratory's DNS."""
    return {name: script for row in rows for name, script in row.names.items()}


class Group:
    """Rows that one guest runs in order; the run happens when the first result is asked for."""

    def __init__(self, stage: Stage, way: str, rows: Sequence[Row]) -> None:
        self._stage = stage
        self._way = way
        self._rows = rows
        self._seen: dict[str, Seen | str] = {}
        self.session: Session | None = None
        self.at_end: Seen | None = None

    def seen(self, row: Row) -> Seen:
        """Return the result of a row."""
        if not self._seen:
            self._run()
        found = self._seen.get(row.id, "the attacker had ended before")
        assert isinstance(found, Seen), found
        return found

    def _run(self) -> None:
        lab = self._stage.lab
        lab.reset_names()
        names = names_of(self._rows) if self._way == "frames" else dict(STACK_NAMES)
        lab.names(names)
        lists: Mapping[str, Sequence[int]] = lists_of(self._rows) if self._way == "frames" else STACK_LISTS
        at = self._rows[0].id
        try:
            with self._stage.session(self._way, lists, deny=DENIED) as session:
                self.session = session
                for row in self._rows:
                    at = row.id
                    self._seen[at] = session.do(row.do, **row.words)
        except AssertionError as exc:
            self._seen[at] = str(exc)
        if self.session is not None:
            self.at_end = self.session.look()


def check(row: Row, seen: Seen) -> None:
    """Assert that exactly the expected contacts happened, and that the attack was really carried out."""
    assert described(seen.contacts) == sorted(row.expected), seen.answer
    packets = Counter(f"{packet.proto} {packet.where}" for packet in seen.packets)
    assert packets == packets_of(row.expected), seen.answer
    assert seen.answer == seen.answer | row.answer


def by_id(row: Row) -> str:
    """Return the test id of a row."""
    return row.id


# ------------------------------------------------------------------------------------------------------------ the rows


@pytest.fixture(scope="module")
def frames_group(stage: Stage) -> Group:
    """Rows for a guest that sends frames to the gate directly."""
    return Group(stage, "frames", FRAME_ROWS)


@pytest.mark.parametrize("row", FRAME_ROWS, ids=by_id)
def test_requests_of_a_compromised_guest_reach_only_listed_hosts(frames_group: Group, row: Row) -> None:
    """Root of a guest, speaking to the gate directly, reaches only what the policy lists."""
    check(row, frames_group.seen(row))


def test_nothing_reached_the_outside_after_the_last_request(frames_group: Group) -> None:
    """After the attacks the gate still runs, nothing more is contacted, and the result counts the bytes sent."""
    frames_group.seen(FRAME_ROWS[-1])
    session, at_end = frames_group.session, frames_group.at_end
    assert session is not None
    assert at_end is not None
    assert (at_end.contacts, at_end.packets) == ([], [])
    assert (session.result["outcome"], session.code) == ("ok", 0), session.said
    (counted,) = [row for row in session.net("allowed") if row["host"] == "ap21.lab.example"]
    assert counted["sent_bytes"] == len(REDIS_PING)


@pytest.mark.parametrize("row", sample(VIOLATIONS, 2), ids=by_id)
def test_a_guest_that_breaks_the_protocol_loses_its_gate(stage: Stage, row: Row) -> None:
    """An invalid frame closes the gate of that run, and the gate ignores everything after it."""
    group = Group(stage, "frames", [row])
    check(row, group.seen(row))
    assert group.at_end is not None
    assert (group.at_end.contacts, group.at_end.packets) == ([], [])
    assert group.session is not None
    assert group.session.counted("denied")["frames"] == 1


@pytest.fixture(scope="module")
def stack_group(stage: Stage) -> Group:
    """Rows for a guest whose root attacks through kernel and relay."""
    return Group(stage, "stack", STACK_ROWS)


@pytest.mark.parametrize("row", STACK_ROWS, ids=by_id)
def test_no_path_bypasses_the_relay(stack_group: Group, row: Row) -> None:
    """Root of a guest reaches only what the gate allows: by DNS, raw sockets, devices or kernel modules."""
    check(row, stack_group.seen(row))


@pytest.mark.parametrize("row", ENDS_RELAY, ids=by_id)
def test_a_guest_without_relay_or_rules_reaches_nothing(stage: Stage, row: Row) -> None:
    """Nothing is reached when root removes the guest's rules, kills its relay, or writes to the relay's stream."""
    stage.lab.reset_names()
    stage.lab.names(dict(STACK_NAMES))
    with stage.session("stack", STACK_LISTS) as session:
        session.order(row.do, **row.words)
        seen = None
        with contextlib.suppress(AssertionError):  # a guest that has lost its relay ends without an answer
            seen = session.look(session.answer())
        if seen is not None:
            check(row, seen)
            time.sleep(0.5)
    at_end = session.look()
    assert (at_end.contacts, at_end.packets) == ([], [])
    assert session.result["outcome"] in ({"ok"} if row.id == "1" else {"guest-lost"}), session.said


def test_an_empty_allowlist_allows_nothing(stage: Stage) -> None:
    """An empty allowlist allows nothing (peers 8): the guest gets no answer, and the result has no connections."""
    with stage.session("frames", {}) as session:
        asked = session.do("exchange", host=SITE.encode().hex(), port=80, say=[], answer_s=0.3)
        assert (asked.answer["code"], asked.contacts, asked.packets) == (None, [], [])
    at_end = session.look()
    assert (at_end.contacts, at_end.packets) == ([], [])
    assert session.result["net"] is None


# ---------------------------------------------------------------------------------------------------------- the floods


def arrived(seen: Seen, event: str, where: str = "") -> int:
    """Return how many contacts of a kind there were."""
    return sum(contact.event == event and contact.where.startswith(where) for contact in seen.contacts)


def memory_bytes(pid: int) -> int:
    """Return the peak memory of a process."""
    found = re.search(
        r"^VmHWM:\s+(\d+) kB", Path("/proc", str(pid), "status").read_text(encoding="ascii"), re.MULTILINE
    )
    assert found is not None
    return int(found[1]) * 1024


def opens_at_most(seconds: float) -> float:
    """Return how many connections a gate may open in that time."""
    return 200 + 100 * seconds + 1


def test_ten_thousand_requests_stay_within_the_rate_limit(stage: Stage) -> None:
    """A gate that is asked for 10,000 connections at once (22) keeps to its rate limit and its memory limit."""
    stage.lab.names({"flood.lab.example": [SITE]})
    with stage.session("frames", {"flood.lab.example": [9]}) as session:
        gate = session.child("gate")
        seen = session.do("open_flood", host="flood.lab.example", port=9, count=10_000)
        peak = memory_bytes(gate)
    codes, seconds = seen.answer["codes"], seen.answer["seconds"]
    connected = arrived(seen, "connect", f"{SITE}:9")
    assert set(codes) == {"0", "6"}, seen.answer
    assert codes["0"] == connected == sum(row["count"] for row in session.net("allowed"))
    assert session.counted("denied") == {"limit": codes["6"]} == {"limit": 10_000 - connected}
    assert 0 < connected <= opens_at_most(seconds)
    assert arrived(seen, "query") <= 2 * connected
    assert len(seen.packets) == arrived(seen, "query") + connected
    assert peak < MEMORY_MAX


def test_a_flood_of_refusals_is_counted_but_not_logged(stage: Stage) -> None:
    """Of refusals of hostile names (69), the log has 20 lines a second beyond a burst of 100 (70); all are counted."""
    words = {"host": "n{}\x1b\n.test", "port": 443, "count": 100_000}
    with stage.session("frames", {"log.lab.example": [443]}) as session:
        seen = session.do("claim_flood", **words)
        assert seen.answer == {"code": 5, "lost": False}
    assert (seen.contacts, seen.packets) == ([], [])
    net = session.result["net"]
    count = sum(row["count"] for row in net["denied"]) + net["more"]
    assert count == 100_001  # and the one request that showed its end
    assert len(net["denied"]) <= 256
    lines = session.net_log()
    assert all(line.endswith(b"\n") and all(32 <= byte < 127 for byte in line[:-1]) for line in lines)
    events = [json.loads(line) for line in lines]
    seconds = (events[-1]["ms"] - events[0]["ms"]) / 1000
    written = [event for event in events if event["event"] != "dropped"]
    assert len(written) <= 100 + 20 * seconds + 1
    assert net["log_dropped"] == count - len(written)
    assert sum(event.get("lines", 0) for event in events) <= net["log_dropped"]


# ----------------------------------------------------------------------------------------------- ends, and other runs


@pytest.mark.parametrize("role", sample(["gate", "resolver"], 1))
def test_a_run_that_loses_its_gate_ends_at_once(stage: Stage, role: str) -> None:
    """A run whose gate or resolver is killed during a transfer ends as `gate-lost`, and nothing else is contacted."""
    stage.lab.names({"mid.lab.example": [SITE]})
    with stage.session("frames", {"mid.lab.example": [19, 9]}) as session:
        session.order("download", host="mid.lab.example", port=19, size=1 << 40)
        time.sleep(0.5)
        os.kill(session.child(role), signal.SIGKILL)
        began = time.monotonic()
        session.process.wait(60)
        assert time.monotonic() - began < 10
        assert described(session.look().contacts) == sorted(reached("mid.lab.example", 19))
    assert (session.code, session.result["outcome"]) == (125, "gate-lost"), session.said
    at_end = session.look()
    assert (at_end.contacts, at_end.packets) == ([], [])


@pytest.mark.parametrize("attack", sample(["noise", "killed"], 1))
def test_an_attack_on_one_gate_does_not_disturb_another_run(stage: Stage, attack: str) -> None:
    """A transfer of one run completes while the gate of another run is broken or killed (23, 72)."""
    stage.lab.names({"other-run.lab.example": [SITE], "attacker.lab.example": [SITE]})
    size = 20_000_000
    with contextlib.ExitStack() as stack:
        good = stack.enter_context(stage.session("frames", {"other-run.lab.example": [19]}))
        bad = stack.enter_context(stage.session("frames", {"attacker.lab.example": [9]}))
        good.order("download", host="other-run.lab.example", port=19, size=size)
        if attack == "killed":
            os.kill(bad.child("gate"), signal.SIGKILL)
            bad.process.wait(60)
        else:
            bad.order("noise", count=1_000_000)
            bad.answer()
        answer = good.answer()
        assert (answer["code"], answer["lost"]) == (0, False)
        assert answer["received"] >= size
    (row,) = good.net("allowed")
    assert (row["host"], row["count"]) == ("other-run.lab.example", 1)
    assert good.net("denied") == []
    assert good.result["outcome"] == "ok", good.said
    assert {row["host"] for row in bad.net("allowed")} <= {"attacker.lab.example"}
