"""Limits on the disk: the records of runs that go by themselves, and what `x07 df` and `x07 image list` count."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.command import x07
from tests.unit.test_prune import DIGEST, age, image, job, run_folder, swept
from x07_sandbox import run_program
from x07_sandbox.host.locks import lock_shared
from x07_sandbox.host.paths import private_dir
from x07_sandbox.images import store
from x07_sandbox.records.pruning import Pruner, prune_records
from x07_sandbox.records.runs import RETENTION, JobRecord
from x07_sandbox.sessions.run import retain_records


@pytest.fixture(autouse=True)
def _places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """State, cache and settings of the test's own."""
    monkeypatch.setenv("X07_VM_STATE_DIR", str(tmp_path / "vm" / "jobs"))
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("X07_VM_GUEST_IMAGE_DIGEST", raising=False)


def limit(tmp_path: Path, **limits: int) -> None:
    """Write the settings of `[disk]`."""
    (tmp_path / "config" / "x07").mkdir(parents=True)
    lines = [f"{name} = {value}" for name, value in limits.items()]
    (tmp_path / "config" / "x07" / "sandbox.toml").write_text("\n".join(["[disk]", *lines]))


def with_changes(record: JobRecord, days: float, *, applied: bool) -> JobRecord:
    """Give a run saved changes."""
    changes = run_folder(record) / "changes"
    (changes / "undo" if applied else changes).mkdir(parents=True)
    (changes / "changes.json").write_bytes(b"{}")
    age(run_folder(record), days)
    return record


def left() -> list[int]:
    """Remove what exceeds the limits, and return the numbers of the runs that are left. Their jobs are left too."""
    prune_records(Pruner(pytest.fail, dry_run=False))
    jobs, runs = (sorted(path.glob("[0-9]*")) for path in (_state(), _state().parent / "runs"))
    assert [path.name.removesuffix("-run") for path in jobs] == [path.name for path in runs]
    return sorted(int(path.name.rpartition("-")[2]) for path in runs)


def _state() -> Path:
    return Path(os.environ["X07_VM_STATE_DIR"])


def test_only_the_newest_records_stay(tmp_path: Path) -> None:
    """Records of runs have a limit of number; the newest stay, and those of the last hour stay in any case."""
    limit(tmp_path, runs_max=2)
    for number, days in enumerate((0.01, 0.02, 1, 2, 3)):
        job(days, number=number)
    assert left() == [0, 1]
    job(0.03, number=2)
    assert left() == [0, 1, 2]


def test_records_have_a_limit_of_size_and_of_age(tmp_path: Path) -> None:
    """Records of runs have a limit of size on the disk, and one of age."""
    limit(tmp_path, runs_mib=1, runs_days=3)
    for number, days in enumerate((0.5, 1, 2, 4)):
        record = job(days, number=number)
        (run_folder(record) / "stdout").write_bytes(bytes(400_000 if number else 4_000))
        age(run_folder(record), days)
    assert left() == [0, 1, 2]
    (run_folder(record := job(0.4, number=5)) / "stdout").write_bytes(bytes(400_000))
    age(run_folder(record), 0.4)
    assert left() == [0, 1, 5]


def test_changes_that_were_not_applied_never_go_by_themselves(tmp_path: Path) -> None:
    """Changes that were not applied stay until `x07 prune`, and undo data stays for the whole age."""
    limit(tmp_path, runs_max=1)
    for number, (days, applied) in enumerate(((6, True), (8, True), (6, False), (400, False))):
        with_changes(job(days, number=number), days, applied=applied)
    job(0, number=9)
    assert left() == [0, 2, 3, 9]
    swept("runs")
    assert left() == [0, 2, 9]


def test_a_live_run_stays(tmp_path: Path) -> None:
    """A run in progress is never removed, however many are newer."""
    limit(tmp_path, runs_max=1)
    live, ended = job(2, number=1), job(3, done=False, number=2)
    job(1, number=0)
    fd = lock_shared(run_folder(live))
    assert left() == [0, 1, 2]
    os.close(fd)
    (ended.folder / "reaped").write_bytes(b"")
    age(ended.folder, 3)
    assert left() == [0]


def test_records_are_removed_once_an_hour_and_announced_once() -> None:
    """After a run, old records are removed at most once an hour, and only the first removal is announced."""
    said: list[str] = []
    job(1)
    retain_records(said.append)
    assert said == []
    mark = _state().parent / "runs" / RETENTION
    for number in (1, 2):
        old = run_folder(job(8, number=number))
        retain_records(said.append)
        assert old.exists()
        os.utime(mark, (0, 0))
        retain_records(said.append)
        assert not old.exists()
    (line,) = said
    assert line.startswith(
        "removed the records of 1 old run: x07 keeps those of the last 7 days, at most 1000 and 1024 MiB"
    )


def test_each_run_removes_old_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`x07 run` and `run_program` remove old records after the run, and only the command says so."""
    monkeypatch.setenv("X07_SANDBOX_BACKEND", "none")
    monkeypatch.setenv("X07_I_ACCEPT_WEAKER_ISOLATION", "1")
    for number in range(3):
        old = run_folder(job(8, number=number))
        if number == 1:
            assert run_program(source="pass", toolchain="python").outcome == "ok"
        else:
            done = x07(tmp_path, "run", "--toolchain", "python", "-c", "pass")
            assert done.code == 0
            assert ("removed the records of 1 old run" in done.err) == (number == 0)
        assert not old.exists()
        os.utime(_state().parent / "runs" / RETENTION, (0, 0))


def test_removal_goes_on_where_it_stopped() -> None:
    """A removal that reaches its time limit has removed something, and the next one goes on."""
    for number in range(3):
        job(8 + number, number=number)
    done = [prune_records(Pruner(pytest.fail, dry_run=False), budget_s=0) for _ in range(4)]
    assert done == [False, False, False, True]
    assert left() == []


def test_a_wrong_setting_is_named(tmp_path: Path) -> None:
    """A setting of `[disk]` that is not a number in its range is an error, and nothing is removed."""
    limit(tmp_path, runs_max=0)
    old = job(8)
    retain_records(pytest.fail)
    done = x07(tmp_path, "df")
    assert done.code == 2
    assert "disk.runs_max is not a whole number from 1 to" in done.err
    assert old.folder.exists()


def test_sizes_add_up(tmp_path: Path) -> None:
    """Rows and rest of `x07 image list` are what `x07 df` and du(1) count: files that images share count once."""
    first, second = image("default"), image("science", size=1000)
    os.link(first.folder / "root.erofs", second.folder / "shared")
    for letter, made in (("a", first.digest), ("b", first.digest), ("c", second.digest), ("d", DIGEST)):
        folder = private_dir(private_dir(store.images_dir().parent / "templates") / (letter * 64))
        with (folder / "ram").open("wb") as file:
            file.write(bytes(100_000))
            file.truncate(1 << 40)
        part = {"file": "ram", "sha256": "0" * 64, "bytes": 1}
        files = {"ram": part, "state": part, "scratch": part, "scratch_disk": {"bytes": 1, "pieces": []}}
        written = {"schema_version": "x", "key": letter * 64, "image": made, "made": {"type": "vm", **files}}
        (folder / "manifest.json").write_text(json.dumps(written))
    listed, counted = (json.loads(x07(tmp_path, *words, "--json").out) for words in (("image", "list"), ("df",)))
    sizes = {part["name"]: part["bytes"] for part in counted["parts"]}
    places = [store.images_dir(), store.images_dir().parent / "templates"]
    du = subprocess.run(["/usr/bin/du", "-s", "-B1", *places], capture_output=True, check=True).stdout.splitlines()
    tops = sum(place.stat().st_blocks * 512 for place in places)
    assert listed["bytes"] == sizes["images"] + sizes["templates"] == sum(int(line.split()[0]) for line in du) - tops
    rows = {row["name"]: (row["bytes"], row["saved_bytes"]) for row in listed["images"]}
    assert rows["default"][0] < 200_000 < listed["bytes"]  # root.erofs is shared
    assert rows["default"][1] == 2 * rows["science"][1] > 200_000
    rest = listed["bytes"] - sum(map(sum, rows.values()))
    assert rest >= 200_000 + rows["science"][1]  # the shared file, and the saved VM of no image
