"""The command `x07 conform`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from x07_sandbox.backends.registry import create
from x07_sandbox.cli.main import main
from x07_sandbox.conformance import behaviours
from x07_sandbox.conformance.behaviours import BEHAVIOURS, Behaviour
from x07_sandbox.conformance.harness import expect

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.vm, pytest.mark.user]

WORDS = ("conform", "--sandbox-backend", "none", "--i-accept-weaker-isolation")


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("X07_VM_STATE_DIR", str(tmp_path / "jobs"))


def test_conform_prints_a_line_per_behaviour(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`x07 conform` prints one line per behaviour, writes its document, and exits with 0 if nothing failed."""
    gaps = create("none").known_gaps
    some = tuple(one for one in BEHAVIOURS if one.group == "outcome" or one.name in gaps)
    monkeypatch.setattr(behaviours, "BEHAVIOURS", some)
    path = tmp_path / "report.json"
    assert main([*WORDS, "--report-out", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3].rstrip(":") for line in lines] == [one.name for one in some]
    assert {line.split()[0] for line in lines} == {"ok", "gap"}
    document = json.loads(path.read_bytes())
    assert (document["schema_version"], document["good"]) == ("x07.sandbox.conform@0.1.0", True)
    (backend,) = document["backends"]
    assert [verdict["name"] for verdict in backend["verdicts"]] == [one.name for one in some]


def test_conform_exits_with_1_on_a_failure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`x07 conform` names each failure with the expected and the actual value, and exits with 1."""
    wrong = Behaviour(name="sum", group="channel", promise="It adds.", check=lambda _bench: expect("sum", 4, 5))
    gaps = [behaviour for behaviour in BEHAVIOURS if behaviour.name in create("none").known_gaps]
    monkeypatch.setattr(behaviours, "BEHAVIOURS", (*gaps, wrong))
    assert main(list(WORDS)) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "FAILED  none channel sum: sum: expected 4, got 5"
