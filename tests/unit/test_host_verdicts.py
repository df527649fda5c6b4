"""The store of test results: one place, valid for one boot, one subject and one key."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from x07_sandbox.host import settings, verdicts
from x07_sandbox.host.linux import boot_ms
from x07_sandbox.host.verdicts import Verdict, file_state, forget

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))


def test_a_result_belongs_to_its_test_subject_and_key() -> None:
    """A result is found only by the same test, subject and key, and replaced by one with another key of a subject."""
    Verdict("speed", "a", key=[1, ["x"]]).write({"factor": 3})
    assert Verdict("speed", "a", key=(1, ("x",))).read()["factor"] == 3
    for other in (Verdict("size", "a", key=[1]), Verdict("speed", "b", key=[1]), Verdict("speed", "a")):
        assert other.read() == {}
    for subject, key in (("a", 2), ("b", 1)):
        Verdict("speed", subject, key=key).write({"factor": key})
    assert Verdict("speed", "a", key=(1, ("x",))).read() == {}
    assert [Verdict("speed", subject, key=key).read()["factor"] for subject, key in (("a", 2), ("b", 1))] == [2, 1]
    assert len(list(Verdict("speed").path.parent.iterdir())) == 2


def test_a_result_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test is made once, and again after a reboot."""
    made: list[int] = []

    def test() -> dict[str, object]:
        made.append(1)
        return {"count": len(made)}

    assert [Verdict("speed").read_or_make(test)["count"] for _ in range(2)] == [1, 1]
    monkeypatch.setattr(verdicts, "boot_id", lambda: "another")
    assert Verdict("speed").read_or_make(test)["count"] == 2


def test_each_failure_of_the_host_doubles_the_time_to_the_next_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure of the host counts for 5 minutes, the next for 10, up to an hour; after a success for 5 again."""
    now_ms = boot_ms()
    monkeypatch.setattr(verdicts, "boot_ms", lambda: now_ms)
    minutes = []
    for _ in range(6):
        Verdict("speed", key=1).write({"works": False}, transient=True)
        assert (Verdict("speed", key=1).read()["works"], Verdict("speed", key=2).read()) == (False, {})
        minutes.append(verdicts.validity(Verdict("speed", key=1).read()))
        now_ms += int(settings.RETRY_MAX_S * 1000)
        assert Verdict("speed", key=1).read() == {}
    assert minutes == [f"for {number} minutes" for number in (5, 10, 20, 40, 60, 60)]
    Verdict("speed", key=2).write({"works": False}, transient=True)
    assert verdicts.validity(Verdict("speed", key=2).read()) == "for 5 minutes"
    Verdict("speed", key=2).write({"works": True})
    Verdict("speed", key=2).write({"works": False}, transient=True)
    assert verdicts.validity(Verdict("speed", key=2).read()) == "for 5 minutes"


def test_all_results_of_a_test_can_be_forgotten() -> None:
    """All results of one test can be removed, and those of other tests stay."""
    for verdict in (Verdict("speed", "a"), Verdict("speed", "b"), Verdict("size")):
        verdict.write({"good": True})
    forget("speed")
    assert [bool(verdict.read()) for verdict in (Verdict("speed", "a"), Verdict("speed", "b"), Verdict("size"))] == [
        False,
        False,
        True,
    ]


def test_the_state_of_a_file_changes_with_the_file(tmp_path: Path) -> None:
    """The state of a file differs after the file was written or replaced, even if its time is set back."""
    path = tmp_path / "file"
    path.write_text("one")
    states = [file_state(str(path))]
    path.write_text("three")
    os.utime(path, ns=(path.stat().st_atime_ns, states[0][4]))  # type: ignore[arg-type]  # a number
    states.append(file_state(str(path)))
    (tmp_path / "new").write_text("three")
    (tmp_path / "new").replace(path)
    states.append(file_state(str(path)))
    assert len(set(states)) == 3
