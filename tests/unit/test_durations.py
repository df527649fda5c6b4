"""Runs start the slowest test files first, by times that `pytest --record-durations` writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests import durations
from tests.durations import Recorder, group_of, recorded, slowest_first

if TYPE_CHECKING:
    from pathlib import Path


def test_files_are_ordered_by_their_recorded_time() -> None:
    """Files without a recorded time start first, then the slowest; files of equal time stay in their order."""
    names = ["a", "b", "new", "a", "c", "d", "newer"]
    assert slowest_first(names, {"a": 0, "b": 7, "c": 90, "d": 7, "gone": 5}) == ["new", "newer", "c", "b", "d", "a"]
    assert slowest_first(names, {}) == ["a", "b", "new", "c", "d", "newer"]


def test_the_tests_of_an_engine_are_one_group() -> None:
    """Tests with an engine in their parameters, and files that need one, form a group; others one for each file."""
    groups = {
        "tests/contract/test_contract.py::test_it[podman-arguments]": "podman",
        "tests/chaos/test_chaos.py::test_it[containerd]": "containerd",
        "tests/containers/test_containers.py::test_it": "podman",
        "tests/contract/test_contract.py::test_it[qemu-arguments]": "tests/contract/test_contract.py",
        "tests/unit/test_a.py::test_it[a::b-podmans]": "tests/unit/test_a.py",
    }
    assert {name: group_of(name) for name in groups} == groups


def test_a_record_keeps_the_times_of_files_that_did_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recording adds up a file's time and drops files that are gone; an interrupted run records nothing."""
    record = tmp_path / "tests" / "durations.json"
    record.parent.mkdir()
    monkeypatch.setattr(durations, "RECORD", record)
    assert recorded() == {}
    for name in ("test_a.py", "test_b.py"):
        (record.parent / name).touch()
    record.write_text('{"tests/test_a.py": 4, "tests/test_b.py": 5, "tests/test_gone.py": 6}')
    recorder = Recorder()
    for step, seconds in (("setup", 2.6), ("call", 9.0)):
        report = pytest.TestReport("tests/test_b.py::test_x[1::2]", ("", 0, ""), {}, "passed", None, step)  # type: ignore[arg-type]
        report.duration = seconds
        recorder.pytest_runtest_logreport(report)
    recorder.pytest_sessionfinish(pytest.ExitCode.INTERRUPTED)
    assert recorded()["tests/test_b.py"] == 5
    recorder.pytest_sessionfinish(pytest.ExitCode.TESTS_FAILED)
    assert recorded() == {"tests/test_a.py": 4, "tests/test_b.py": 12}
