"""The bench verifies every timed run and removes the records it adds."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench.figures import Figures, WrongRunError
from bench.ours import check
from bench.scale import more_jobs
from x07_sandbox.policy.controls import make_plan
from x07_sandbox.policy.decode import default_policy
from x07_sandbox.policy.features import vm_features

OUTPUT = b"got a\n"


@pytest.fixture
def result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The short result of a valid run, with its jobs on record."""
    monkeypatch.setenv("X07_VM_STATE_DIR", str(tmp_path))
    for name in ("1-1-0-build", "1-1-0-run"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "done").touch()
    plan = make_plan(default_policy(), vm_features("vm-emulated"))
    return {
        "outcome": "ok",
        "reason": "",
        "isolation": "vm-emulated",
        "jail": "namespaces, root",
        "artifact_from": "build",
        "stdout": {"text": OUTPUT.decode()},
        "phases": {name: {"start": "clone", "job_id": f"1-1-0-{name}"} for name in ("build", "run")},
        "controls": [{"field": control.field, "state": control.state} for control in plan.controls],
    }


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (("outcome",), "failed", "outcome"),
        (("stdout", "text"), "got b\n", "output"),
        (("jail",), None, "jail"),
        (("phases", "build", "start"), "cold", "start"),
        (("phases", "build", "job_id"), "1-1-1-build", "record"),
        (("controls", 0, "state"), "refused", "controls"),
    ],
)
def test_a_timed_run_that_is_not_what_it_claims_ends_the_bench(
    result: dict[str, Any], place: tuple[str | int, ...], value: object, named: str
) -> None:
    """The bench stops if a timed run has the wrong VM, record, output or control."""
    good = copy.deepcopy(result)
    check(msgspec.json.encode(good), OUTPUT, start="clone", built="build")
    part: Any = result
    for key in place[:-1]:
        part = part[key]
    if value is None and place[0] == "phases":
        del part[place[-1]]
    else:
        part[place[-1]] = value
    with pytest.raises(WrongRunError, match=named):
        check(msgspec.json.encode(result), OUTPUT, start="clone", built="build")


def test_records_that_the_bench_adds_are_gone_however_it_ends(result: dict[str, Any], tmp_path: Path) -> None:
    """Job records added by the bench are removed even if it is interrupted."""
    assert result
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt), more_jobs(3):  # noqa: PT012 - the block is what is tried
        assert len(list(tmp_path.glob("*/done"))) == 5
        raise KeyboardInterrupt
    assert sorted(tmp_path.iterdir()) == before


def test_a_case_that_fails_costs_no_other_figure(tmp_path: Path) -> None:
    """A case that fails is recorded with its error and is not tried again; the file has all other figures."""
    figures, tries = Figures(tmp_path / "figures.json"), []

    def fails() -> float:
        tries.append(1)
        raise WrongRunError("its output is wrong")

    for counts in (False, True, True):
        figures.time("broken", fails, counts=counts)
        figures.time("works", lambda: 0.5, counts=counts)
    with figures.recording("rows"):
        figures.row("memory", "30 MB")
        subprocess.run(["/bin/sh", "-c", "echo no space >&2; exit 3"], check=True, capture_output=True)
    found = json.loads((tmp_path / "figures.json").read_bytes())
    assert (found["times_s"], found["rows"], len(tries)) == ({"works": [0.5, 0.5]}, {"memory": "30 MB"}, 1)
    assert found["errors"]["broken"] == "WrongRunError: its output is wrong"
    assert found["errors"]["rows"].endswith("no space")
