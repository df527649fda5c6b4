"""When a recorded job may be ended by another process: its owner is gone or it has expired."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any

import pytest

from x07_sandbox.host.linux import boot_id, pid_namespace
from x07_sandbox.host.processes import Identity, own_identity
from x07_sandbox.host.settings import DAY_S
from x07_sandbox.records import stopping
from x07_sandbox.records.reader import Now, StoredJob, all_stored, here_and_now, judge, read_stored, state_of
from x07_sandbox.records.runs import (
    Claim,
    JobRecord,
    create_record,
    mark_done,
    mark_reaped,
    new_run_id,
    runner_instance,
    write_owner,
)

if TYPE_CHECKING:
    from pathlib import Path

GONE = Identity(pid=2**22 - 1, start_ticks=1)
CLEANUP_MS = 30_000
WALL_MS = 10_000
GRACE_MS = 1000

pytestmark = pytest.mark.usefixtures("state")


def recorded(runner: Identity | None = None, **processes: Identity) -> JobRecord:
    """A recorded job that has not ended."""
    claim = Claim(run_id=new_run_id(), phase="run", wall_ms=WALL_MS)
    record = create_record(claim, backend="none", image_digest="")
    write_owner(record, runner=runner or own_identity(), processes=processes, cgroups=())
    return record


def edit(record: JobRecord, name: str = "owner.json", **values: Any) -> None:  # noqa: ANN401 - JSON
    """Change fields of one of the record's files; None removes a field."""
    path = record.folder / name
    document = json.loads(path.read_bytes()) | values
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def stored(record: JobRecord) -> StoredJob:
    """The record as stored."""
    found = read_stored(record.folder, runner_instance(record.folder.parent))
    assert found is not None
    return found


def fate(record: JobRecord, **now: Any) -> str:  # noqa: ANN401 - as above
    """The rule's verdict, now or at the given times."""
    return judge(stored(record), here_and_now()._replace(**now)).fate


def test_a_live_owner_inside_its_deadline_is_left_alone() -> None:
    """A job with a live runner and time left is never touched; one of a dead runner, reused pid or earlier boot is."""
    me, earlier = own_identity(), recorded()
    edit(earlier, boot_id="0" * 36)
    assert fate(recorded()) == "live"
    reused = recorded(Identity(pid=me.pid, start_ticks=me.start_ticks - 1))
    assert [fate(record) for record in (recorded(GONE), reused, earlier)] == ["dead"] * 3


def test_in_another_pid_namespace_only_the_deadline_counts() -> None:
    """A job of another pid namespace goes only when it has expired."""
    record = recorded(GONE)
    edit(record, pid_namespace="pid:[1]")
    assert fate(record) == "live"
    assert fate(record, boot_ms=record.deadline_boot_ms + GRACE_MS + CLEANUP_MS + 1) == "expired"


def test_a_job_of_another_pid_namespace_is_not_proven_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who cannot see the processes of a job does not record it as gone until a day after its deadline."""
    record = recorded(GONE)
    edit(record, pid_namespace="pid:[1]")
    monkeypatch.setattr(stopping, "sees_every_process", lambda: False)
    assert not stopping.stop_recorded(record)
    assert not (record.folder / "reaped").exists()
    monkeypatch.setattr(stopping, "boot_ms", lambda: record.deadline_boot_ms + DAY_S * 1000)
    assert stopping.stop_recorded(record)


@pytest.mark.parametrize(("late_ms", "expected"), [(0, "live"), (GRACE_MS + CLEANUP_MS, "live"), (31_001, "expired")])
def test_a_job_expires_after_deadline_grace_and_clean_up(late_ms: int, expected: str) -> None:
    """A job expires after deadline, grace and clean-up time."""
    record = recorded()
    assert fate(record, boot_ms=record.deadline_boot_ms + late_ms) == expected


@pytest.mark.parametrize("step_ms", [-(10**12), 10**12])
def test_a_step_of_the_wall_clock_changes_nothing(monkeypatch: pytest.MonkeyPatch, step_ms: int) -> None:
    """A jump of the wall clock changes no verdict."""
    record, now = recorded(), time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + step_ms * 1_000_000)
    assert fate(record) == "live"
    assert fate(record, boot_ms=record.deadline_boot_ms + 40_000) == "expired"


@pytest.mark.parametrize("end", ["done", "reaped"])
def test_an_ended_job_is_over(end: str) -> None:
    """A job with done or reaped is over."""
    record = recorded(GONE)
    mark_done(record) if end == "done" else mark_reaped(record)
    assert fate(record) == "ended"
    assert stored(record).ended == end


@pytest.mark.parametrize(
    ("name", "values", "standing"),
    [
        ("owner.json", {"schema_version": "x07.sandbox.owner@9.0.0"}, "newer"),
        ("job.json", {"schema_version": "x07.vm.job@0.2.0"}, "newer"),
        ("owner.json", {"instance": "e"}, "damaged"),
        ("owner.json", {"runner": {"pid": 0, "start_ticks": 1}}, "damaged"),
        ("owner.json", {"runner": {"pid": 10**30, "start_ticks": 1}}, "damaged"),
        ("owner.json", {"processes": {str(n): {"pid": 2, "start_ticks": 1} for n in range(100)}}, "damaged"),
        ("owner.json", {"cgroups": ["x" * 5000]}, "damaged"),
        ("owner.json", {"labels": {}}, "damaged"),
        ("owner.json", {"labels": {"io.x07.runner_instance": "ri-" + "0" * 32, "io.x07.image_digest": ""}}, "foreign"),
        ("owner.json", {"deadline_boot_ms": None}, "damaged"),
        ("job.json", {"backend": "../x"}, "damaged"),
        ("job.json", {"deadline_unix_ms": "soon"}, "damaged"),
        ("job.json", {"padding": "x" * 70_000}, "damaged"),
    ],
)
def test_foreign_and_damaged_records_are_kept(name: str, values: dict[str, Any], standing: str) -> None:
    """A damaged, newer or foreign record is kept."""
    record = recorded(GONE)
    edit(record, name, **values)
    assert stored(record).standing == standing
    assert fate(record, boot_ms=2**52) == "kept"


def test_a_link_is_no_record(tmp_path: Path) -> None:
    """A record is never reached through a symbolic link, and a pipe in its place does not block."""
    record, other = recorded(GONE), recorded(GONE)
    record.folder.rename(tmp_path / "moved")
    record.folder.symlink_to(tmp_path / "moved")
    assert stored(record).standing == "foreign"
    (other.folder / "owner.json").rename(tmp_path / "owner.json")
    (other.folder / "owner.json").symlink_to(tmp_path / "owner.json")
    assert stored(other).owner is None
    (other.folder / "owner.json").unlink()
    os.mkfifo(other.folder / "owner.json")
    assert stored(other).owner is None


def test_each_job_has_a_state() -> None:
    """Each job has one state word."""
    me = own_identity()
    now = Now(boot_id(), pid_namespace(), here_and_now().boot_ms)
    expected = {
        "starting": recorded(),
        "running": recorded(inner=me),
        "ending": recorded(inner=GONE),
        "orphaned": recorded(GONE, inner=me),
    }
    assert {word: state_of(stored(record), now) for word, record in expected.items()} == {
        word: word for word in expected
    }
    assert len(all_stored()) == len(expected)
