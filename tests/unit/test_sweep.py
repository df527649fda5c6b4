"""The sweep: what it removes and what it leaves alone."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import threading
from typing import TYPE_CHECKING, ClassVar

import pytest

from tests.command import X07
from tests.contract.test_one_file_backend import registered
from tests.unit.test_host_processes import identity_of, start
from tests.unit.test_stop_rules import GONE, edit, recorded
from x07_sandbox.backends.process import NoneBackend
from x07_sandbox.backends.registry import BackendRow, create, find
from x07_sandbox.host import waiting
from x07_sandbox.host.processes import Identity, is_alive
from x07_sandbox.library.cleanup import sweep
from x07_sandbox.records.pruning import Pruner
from x07_sandbox.records.runs import Claim, JobRecord, create_record, mark_done, new_run_id
from x07_sandbox.records.stopping import Orphan
from x07_sandbox.records.sweep import SweepReport, sweep_jobs, why_kept
from x07_sandbox.sessions.transfers import RunFolder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conftest import Need

pytestmark = pytest.mark.usefixtures("state")
OURS = "ri-" + "1" * 32


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))


def swept(*, dry_run: bool = False) -> SweepReport:
    """A complete sweep."""
    return sweep(dry_run=dry_run, progress=lambda _text: None)


def names(report: SweepReport, kind: str = "job") -> list[str]:
    """The ids of what was removed."""
    return [gone.id for gone in report.removed if gone.kind == kind]


def reason_kept(report: SweepReport, record: JobRecord) -> str:
    """The reason why a job was kept, or ""."""
    return "".join(kept.why for kept in report.kept if kept.id == record.job_id)


def ended(record: JobRecord) -> bool:
    """Return whether the job is recorded as reaped."""
    return (record.folder / "reaped").exists()


@contextlib.contextmanager
def sleeper(*words: str) -> Iterator[Identity]:
    """A live process of this user with these arguments."""
    with start(*words) as child:
        try:
            yield identity_of(child.pid)
        finally:
            child.kill()


def test_only_jobs_of_dead_runners_are_reaped() -> None:
    """A sweep reaps the job of a dead runner, which a dry run only names, and leaves that of a live one untouched."""
    dead, live = recorded(GONE), recorded()
    before = {path.name: path.read_bytes() for path in live.folder.iterdir()}
    dry = swept(dry_run=True)
    assert not ended(dead)
    report = swept()
    assert names(report) == [dead.job_id]
    assert report.removed == dry.removed
    assert (dead.folder / "reaped").read_bytes() == b"reaped\n"
    assert not (dead.folder / "done").exists()
    assert {path.name: path.read_bytes() for path in live.folder.iterdir()} == before
    assert swept().removed == ()


@pytest.mark.parametrize("is_recorded", [True, False])
def test_processes_of_a_dead_runner_are_killed(*, is_recorded: bool) -> None:
    """A sweep kills the recorded processes of a dead runner, and finds unrecorded ones by their mark."""
    record = recorded(GONE)
    with sleeper(record.mark) as identity:
        if is_recorded:
            edit(record, processes={"inner": {"pid": identity.pid, "start_ticks": identity.start_ticks}})
        assert names(swept()) == [record.job_id]
        assert not is_alive(identity)


@pytest.mark.parametrize("role", ["processes", "runner"])
def test_a_forged_record_kills_no_process(role: str) -> None:
    """A forged record cannot make a sweep kill a foreign process, also if its job has expired and is ended."""
    record = recorded(GONE)
    with sleeper("no mark") as identity:
        exact = {"pid": identity.pid, "start_ticks": identity.start_ticks}
        if role == "runner":
            edit(record, runner=exact, deadline_boot_ms=1)
        else:
            edit(record, processes={"inner": exact})
        report = swept()
        assert is_alive(identity)
        if role == "processes":
            assert "nothing proves" in reason_kept(report, record)
        assert ended(record) == (role == "runner")


def test_a_job_of_another_sweep_is_skipped() -> None:
    """A sweep skips a job on which another sweep works."""
    record = recorded(GONE)
    fd = os.open(record.folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        assert names(swept()) == []
    finally:
        os.close(fd)
    assert names(swept()) == [record.job_id]


def test_sweeps_at_once_report_each_job_once() -> None:
    """Concurrent sweeps end each dead job exactly once."""
    dead, live = [recorded(GONE) for _ in range(20)], [recorded() for _ in range(5)]
    reports: list[SweepReport] = []
    threads = [threading.Thread(target=lambda: reports.append(swept())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(name for report in reports for name in names(report)) == sorted(one.job_id for one in dead)
    assert all(map(ended, dead))
    assert not any(map(ended, live))


@pytest.mark.parametrize(
    ("name", "values", "why"),
    [
        ("owner.json", {"schema_version": "x07.sandbox.owner@9.0.0"}, "an unknown format"),
        (
            "owner.json",
            {"labels": {"io.x07.runner_instance": OURS, "io.x07.image_digest": ""}},
            "another user or host",
        ),
        ("job.json", {"backend": "podman-of-the-future"}, "no backend 'podman-of-the-future'"),
    ],
)
def test_unreadable_records_are_kept_and_reported(name: str, values: dict[str, object], why: str) -> None:
    """Damaged, newer and foreign records, and unknown backends, are kept and reported."""
    record = recorded(GONE)
    edit(record, name, **values)
    report = swept()
    assert names(report) == []
    assert why in reason_kept(report, record)
    assert not ended(record)


def test_a_record_of_x07_is_reported_and_kept() -> None:
    """A record of X07's own tools is kept, and its process is untouched."""
    with sleeper("x07-1-2-3") as identity:
        folder = recorded(GONE).folder
        (folder / "owner.json").unlink()
        record = json.loads((folder / "job.json").read_bytes())
        record |= {"backend": "vz", "pid": identity.pid, "ctr": {"bin": "/bin/false", "address": "a", "namespace": "n"}}
        (folder / "job.json").write_text(json.dumps(record))
        (folder / "rootfs.cow.img").write_bytes(b"")
        os.utime(folder, (1, 1))
        report = swept()
        assert is_alive(identity)
        assert (report.removed, [kept.id for kept in report.kept]) == ((), [folder.name])
        assert (folder / "rootfs.cow.img").exists()


def test_another_users_job_stays(need: Need) -> None:
    """A job folder of another user is left alone."""
    need(os.geteuid() == 0, "only root can give a folder to another user", installable=False)
    record = recorded(GONE)
    os.chown(record.folder, 65534, 65534)
    report = swept()
    assert names(report) == []
    assert "uid 65534" in reason_kept(report, record)
    assert not ended(record)


# jobs that were never started


def unstarted(*, phase: str = "run", backend: str = "qemu", pid: int = GONE.pid, age_s: int = 120) -> JobRecord:
    """The folder of a job whose runner was killed before it recorded itself."""
    run_id = new_run_id().split("-")
    claim = Claim(run_id=f"{run_id[0]}-{pid}-{run_id[2]}", phase=phase, wall_ms=1000)
    record = create_record(claim, backend=backend, image_digest="")
    then = waiting.unix_ms() / 1000 - age_s
    os.utime(record.folder, (then, then))
    return record


def test_an_unstarted_job_is_removed() -> None:
    """The folder of a job that never started is removed after a minute, if no foreign files are in it."""
    old, young, owned, full = unstarted(), unstarted(age_s=10), unstarted(pid=os.getpid()), unstarted()
    (full.folder / "in").mkdir()
    empty = unstarted(phase="warm")
    (empty.folder / "job.json").unlink()
    for record in (empty, full):
        os.utime(record.folder, (1, 1))
    assert sorted(names(swept(), "unstarted")) == sorted([old.job_id, empty.job_id])
    assert [record.folder.exists() for record in (old, young, owned, full)] == [False, True, True, True]


def test_a_running_run_keeps_its_unstarted_jobs() -> None:
    """A running run keeps its unstarted jobs, and one that may be X07's stays unless it is of a run of ours."""
    for backend, is_kept in (("qemu", False), ("podman", True)):
        record = unstarted(age_s=100_000, backend=backend)
        if is_kept:
            assert names(swept(), "unstarted") == []
        with contextlib.ExitStack() as stack:
            RunFolder(record.run_id, stack)
            assert names(swept(), "unstarted") == []
        assert names(swept(), "unstarted") == [record.job_id]


# instances without a record

LABELS = {
    "io.x07.schema": "1",
    "io.x07.runner_instance": OURS,
    "io.x07.job_id": "1-2-3-run",
    "io.x07.deadline_unix_ms": "1000000",
}


@pytest.mark.parametrize(
    ("labels", "live", "now", "why"),
    [
        ({}, (), 1_030_001, ""),
        ({}, (), 1_030_000, "deadline has not passed"),
        ({}, ("1-2-3-run",), 9_999_999, "is recorded as live"),
        ({"io.x07.schema": "2"}, (), 9_999_999, "label of this version"),
        ({"io.x07.schema": ""}, (), 9_999_999, "label of this version"),
        ({"io.x07.runner_instance": "ri-" + "2" * 32}, (), 9_999_999, "another user or host"),
        ({"io.x07.runner_instance": ""}, (), 9_999_999, "another user or host"),
        ({"io.x07.deadline_unix_ms": ""}, (), 9_999_999, "damaged"),
        ({"io.x07.deadline_unix_ms": "-1"}, (), 9_999_999, "damaged"),
        ({"io.x07.deadline_unix_ms": "9" * 40}, (), 9_999_999, "damaged"),
        ({"io.x07.deadline_unix_ms": "1e3"}, (), 9_999_999, "damaged"),
    ],
)
def test_only_expired_own_instances_are_removed(
    labels: dict[str, str], live: tuple[str, ...], now: int, why: str
) -> None:
    """An unrecorded instance is removed only if it is ours, expired and not live."""
    found = why_kept(LABELS | labels, instance=OURS, live=live, now_unix_ms=now)
    assert (why in found) if why else found == ""


class Engine(NoneBackend):
    """A backend whose instances outlive the process; here, a table."""

    held: ClassVar[dict[str, dict[str, str]]] = {}

    def orphans(self) -> list[Orphan]:
        """Return all instances."""
        return [Orphan(id=name, labels=labels) for name, labels in self.held.items()]

    def remove(self, orphan: Orphan) -> bool:
        """Remove the instance."""
        return self.held.pop(orphan.id, None) is not None


def test_unrecorded_instances_are_found(state: Path) -> None:
    """A sweep removes expired, unrecorded instances of ours from an engine and no others."""
    live, dead = recorded(), recorded(GONE)
    ours = dead.labels() | {"io.x07.job_id": f"1-{GONE.pid}-3-run", "io.x07.run_id": f"1-{GONE.pid}-3-run"}
    expired = {"io.x07.deadline_unix_ms": "1"}
    elsewhere = ours | expired | {"io.x07.job_id": "x", "io.x07.run_id": f"1-{os.getpid()}-3-run"}
    Engine.held = {"orphan": ours | expired, "young": ours, "other": LABELS, "live": live.labels() | expired}
    Engine.held |= {"elsewhere": elsewhere}  # its runner lives, and its record lies in another folder
    done = recorded(GONE)
    mark_done(done)
    # It was created by a client that outlived its runner.
    Engine.held |= {"late": done.labels() | {"io.x07.run_id": f"1-{GONE.pid}-3-run"}}
    Engine.held |= {"odd": ours | expired | {"io.x07.job_id": "y", "io.x07.run_id": "1-\N{SUPERSCRIPT TWO}-3"}}
    with registered(BackendRow("an-engine", "vm", ("container",), create), Engine):
        dry = swept(dry_run=True)
        assert len(Engine.held) == 7
        report = swept()
    assert (
        names(report, "instance")
        == names(dry, "instance")
        == [*("an-engine:orphan", "an-engine:late", "an-engine:odd")]
    )
    assert set(Engine.held) == {"young", "other", "live", "elsewhere"}
    assert {kept.id for kept in report.kept} == {f"an-engine:{name}" for name in Engine.held}
    assert state.is_dir()


# the places around


def test_a_sweep_on_an_unused_host_creates_nothing(state: Path) -> None:
    """On an unused host a sweep removes and creates nothing."""
    assert swept() == SweepReport(dry_run=False, removed=(), kept=())
    assert not state.exists()


def test_a_sweep_ends_with_its_budget() -> None:
    """A sweep ends with its time budget, and the next one continues."""
    record = recorded(GONE)
    for budget_s, removed in ((0, []), (60, [record.job_id])):
        pruner = Pruner(lambda _text: None, dry_run=False)
        sweep_jobs(pruner, find, budget_s)
        assert [row.name for row in pruner.removed] == removed


# before a run


def run_here(code: str = "pass") -> subprocess.CompletedProcess[str]:
    """`x07 run` of a Python program without a VM."""
    argv = [*X07, "run", "--sandbox-backend", "none"]
    argv += ["--i-accept-weaker-isolation", "--toolchain", "python", "-c", code]
    return subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def test_a_run_sweeps_first() -> None:
    """A run sweeps first and reports what it removed."""
    dead, live = recorded(GONE), recorded()
    dead.folder.rename(dead.folder.with_name(f"1-{GONE.pid}-0-run"))
    assert "removed 1 job of dead x07 processes\n" in run_here().stderr
    assert (dead.folder.with_name(f"1-{GONE.pid}-0-run") / "reaped").exists()
    assert not ended(live)
    assert "dead runners" not in run_here().stderr


def test_damaged_records_never_prevent_a_run() -> None:
    """Damaged records never prevent a run."""
    record = recorded(GONE)
    folder = record.folder.rename(record.folder.with_name(f"1-{GONE.pid}-0-run"))
    (folder / "owner.json").write_bytes(b"[" * 60_000)
    (folder.parent / f"2-{GONE.pid}-0-run").write_bytes(b"")
    (folder.parent / f"3-{GONE.pid}-0-run").symlink_to("/nowhere")
    assert run_here("raise SystemExit(7)").returncode == 7
