"""`x07 prune`: removes what is expired or unreferenced, and keeps and reports what cannot be judged."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from tests.command import x07
from tests.published import document
from tests.unit.test_images_manifest import MANIFEST
from x07_sandbox.cli.main import main
from x07_sandbox.host import waiting
from x07_sandbox.host.locks import file_lock
from x07_sandbox.host.paths import private_dir
from x07_sandbox.host.processes import Identity, own_identity
from x07_sandbox.host.verdicts import Verdict
from x07_sandbox.images import store
from x07_sandbox.library.cleanup import prune
from x07_sandbox.programs.artifacts import artifact_key
from x07_sandbox.records.pruning import PARTS, Part, PruneReport, everything
from x07_sandbox.records.runs import APPLYING, Claim, JobRecord, create_record, mark_done, write_owner
from x07_sandbox.sessions.transfers import RunFolder

DAY_MS = 86_400_000
DIGEST = "sha256:" + "ab" * 32
GONE = Identity(pid=2**22 - 1, start_ticks=1)


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """State and cache of the test's own."""
    monkeypatch.setenv("X07_VM_STATE_DIR", str(tmp_path / "vm" / "jobs"))
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("X07_VM_GUEST_IMAGE_DIGEST", raising=False)


def age(path: Path, days: float) -> None:
    """Make a file or tree look untouched for *days*."""
    then = (waiting.unix_ms() - days * DAY_MS) / 1000
    for below in path.iterdir() if path.is_dir() and not path.is_symlink() else ():
        age(below, days)
    os.utime(path, (then, then), follow_symlinks=False)


def run_id(days: float, number: int = 0) -> str:
    """The id of a run that started *days* ago."""
    return f"{int(waiting.unix_ms() - days * DAY_MS)}-{GONE.pid}-{number}"


def job(days: float, *, done: bool = True, runner: Identity = GONE, number: int = 0) -> JobRecord:
    """The record of a job that ended *days* ago, and its run folder."""
    record = create_record(
        Claim(run_id=run_id(days, number), phase="run", wall_ms=1000), backend="qemu", image_digest=DIGEST
    )
    write_owner(record, runner=runner, processes={"runner": runner}, cgroups=())
    if done:
        mark_done(record)
    with contextlib.ExitStack() as stack:
        folder = RunFolder(record.run_id, stack).path
        (folder / "result.json").write_bytes(b"{}")
    age(record.folder, days)
    age(folder, days)
    return record


def run_folder(record: JobRecord) -> Path:
    """The folder of the job's run."""
    return record.folder.parent.parent / "runs" / record.run_id


def swept(*parts: Part, dry_run: bool = False) -> PruneReport:
    """The report of `prune`."""
    return prune(parts or PARTS, progress=lambda _text: None, dry_run=dry_run)


def paths(report: PruneReport) -> set[str]:
    """The removed paths."""
    return {removed.path for removed in report.removed}


def why_kept(report: PruneReport, path: Path) -> str:
    """The reason why something was kept, or ""."""
    return "".join(kept.why for kept in report.kept if kept.path == str(path))


# records


def test_expired_records_are_removed() -> None:
    """Records and run folders older than the retention are removed, and what a killed prune has left."""
    old, young = job(8), job(6, number=1)
    left = old.folder.with_name(f".pruned-{job(8, number=2).folder.name}")
    old.folder.with_name(left.name.removeprefix(".pruned-")).rename(left)
    report = swept("runs")
    assert {str(old.folder), str(run_folder(old)), str(left)} <= paths(report)
    assert report.bytes > 0
    assert not any(path.exists() for path in (old.folder, run_folder(old), left))
    assert (young.folder / "job.json").is_file()
    assert (run_folder(young) / "result.json").is_file()
    assert swept("runs").removed == ()


@pytest.mark.parametrize("runner", [GONE, own_identity()], ids=["not-ended", "alive"])
def test_an_unfinished_job_is_kept(runner: Identity) -> None:
    """A job without `done` or `reaped`, or with a live process, is kept and named, however old."""
    record = job(400, done=runner != GONE, runner=runner)
    report = swept("runs")
    assert report.removed == ()
    why = "not recorded as gone" if runner == GONE else "one of its processes is alive"
    assert why in why_kept(report, record.folder)
    if runner == GONE:
        (record.folder / "reaped").write_bytes(b"reaped\n")
        age(record.folder, 400)
        assert paths(swept("runs")) == {str(record.folder), str(run_folder(record))}


def test_a_run_in_progress_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A running run is kept, even after a wrong clock, and so is one with half-applied changes."""
    with monkeypatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: 1_000_000_000)  # one second of 1970
        record = job(0)
    marker = private_dir(run_folder(record).parent / APPLYING) / record.run_id
    with contextlib.ExitStack() as stack:
        RunFolder(record.run_id, stack)
        age(run_folder(record), 8)
        assert swept("runs").removed == ()
    marker.touch()
    assert swept("runs").removed == ()
    marker.unlink()
    assert paths(swept("runs")) == {str(record.folder), str(run_folder(record))}


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("job.json", b'{"schema_version": "x07.vm.job@0.2.0"}', "an unknown format: 'x07.vm.job@0.2.0'"),
        ("job.json", b"[" * 100_000, "damaged"),
        ("job.json", None, "did not create it"),
    ],
)
def test_unreadable_records_are_kept_and_reported(name: str, content: bytes | None, why: str) -> None:
    """Damaged, newer and foreign records are kept and reported."""
    record = job(400)
    (record.folder / name).unlink()
    if content is not None:
        (record.folder / name).write_bytes(content)
    age(record.folder, 400)
    report = swept("runs")
    assert report.removed == ()
    assert why in why_kept(report, record.folder)
    assert run_folder(record).is_dir()


def test_no_link_is_followed(tmp_path: Path) -> None:
    """Symbolic links are never followed."""
    record, other, third = job(400), job(400, number=1), job(400, number=2)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "f").write_bytes(b"kept")
    shutil.move(record.folder, tmp_path / "moved")
    record.folder.symlink_to(tmp_path / "moved")
    (run_folder(record) / "link").symlink_to(precious)
    shutil.rmtree(run_folder(other))
    run_folder(other).symlink_to(precious)
    (third.folder / "done").unlink()
    (third.folder / "done").symlink_to(precious / "f")
    for path in (record.folder, run_folder(record), run_folder(other), third.folder, precious):
        age(path, 400)
    report = swept("runs")
    assert (precious / "f").read_bytes() == b"kept"
    assert (tmp_path / "moved" / "job.json").is_file()
    assert "link" in why_kept(report, record.folder)
    assert "link" in why_kept(report, run_folder(other))
    assert "not recorded as gone" in why_kept(report, third.folder)
    assert not run_folder(record).exists()


def test_other_files_in_the_state_folder_stay(tmp_path: Path) -> None:
    """Other files in the state folder are ignored."""
    record = job(8)
    root = record.folder.parent
    for name in ("notes.txt", "1-2-3-run.txt", "mine"):
        (root / name).mkdir()
        (root.parent / "runs" / name).mkdir()
        age(root / name, 400)
    (tmp_path / "vm" / "other").write_bytes(b"")
    report = swept("runs")
    assert paths(report) == {str(record.folder), str(run_folder(record))}
    assert sorted(path.name for path in root.iterdir()) == ["1-2-3-run.txt", "mine", "notes.txt"]
    assert (tmp_path / "vm" / "runner_instance").is_file()


# images and cache


def image(name: str = "", *, base: str = "cd" * 32, size: int = 200_000) -> store.Image:
    """An image in the store whose root file is shared with its base."""
    made = store.sealed(replace(MANIFEST, base=base, kernel_release=f"{name or 'none'}-{size}"))
    folder = store.images_dir() / made.digest.removeprefix("sha256:")
    folder.mkdir(mode=0o700)
    (folder / "root.erofs").write_bytes(os.urandom(size))
    (folder / "manifest.json").write_bytes(store.encode_manifest(made))
    if name:
        store.set_name(name, folder.name)
    return store.load(folder.name, name)


def test_only_unnamed_images_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only unnamed, unpinned images are removed."""
    named, old, pinned = image("default"), image(size=1000), image(size=2000)
    monkeypatch.setenv("X07_VM_GUEST_IMAGE_DIGEST", pinned.digest)
    report = swept("images")
    assert paths(report) == {str(old.folder)}
    assert "X07_VM_GUEST_IMAGE_DIGEST" in why_kept(report, pinned.folder)
    assert [found.digest for found in store.list_images()] == [named.digest, pinned.digest]
    assert list((store.images_dir().parent / "tmp").iterdir()) == []


def test_reported_bytes_are_those_freed() -> None:
    """The reported size is the disk space freed, counting shared files once."""
    named, old = image("default"), image(size=1000)
    shared = named.folder / "root.erofs"
    (old.folder / "root.erofs").unlink()
    os.link(shared, old.folder / "root.erofs")
    assert swept("images", dry_run=True).bytes < 200_000
    (store.images_dir() / "names" / "default").unlink()
    report = swept("images", dry_run=True)
    assert len(report.removed) == 2
    assert 200_000 <= report.bytes < 300_000
    assert swept("images").bytes == report.bytes


def test_a_damaged_image_is_kept_and_reported() -> None:
    """A damaged image is kept and reported."""
    broken = image()
    (broken.folder / "manifest.json").write_bytes(b'{"schema_version": "x07.sandbox.image@9.0.0"}')
    (store.images_dir() / f"base-{'0' * 32}").mkdir()
    report = swept("images")
    assert report.removed == ()
    assert "x07.sandbox.image@9.0.0" in why_kept(report, broken.folder)
    assert "damaged" in why_kept(report, store.images_dir() / f"base-{'0' * 32}")


def test_prune_waits_for_a_build() -> None:
    """Prune waits for a running build and says so."""
    fresh = image()
    printed: list[str] = []
    waiting, reports = threading.Event(), []

    def say(text: str) -> None:
        printed.append(text)
        waiting.set()

    thread = threading.Thread(target=lambda: reports.append(prune(["images"], progress=say, dry_run=False)))
    with file_lock(store.images_dir() / ".lock"):
        thread.start()
        assert waiting.wait(60)
        store.set_name("default", fresh.folder.name)
    thread.join(60)
    assert reports[0].removed == ()
    assert printed == ["waiting for an image build to end"]


def test_unused_artifacts_are_removed(tmp_path: Path) -> None:
    """Artifacts unused for longer than the retention are removed."""
    folder = store.images_dir().parent / "artifacts"
    folder.mkdir(mode=0o700)
    old, young, link = (folder / artifact_key(name) for name in ("old", "young", "link"))
    old.write_bytes(bytes(10_000))
    young.write_bytes(bytes(10_000))
    link.symlink_to(tmp_path / "elsewhere")
    half, fresh = folder / f".{old.name}.{'0' * 16}", folder / f".{young.name}.{'0' * 16}"
    for path, days in ((old, 8), (young, 6), (link, 400), (half, 2), (fresh, 0)):
        if not path.is_symlink():
            path.touch()
        age(path, days)
    report = swept("cache")
    assert paths(report) == {str(old), str(half)}
    assert "link" in why_kept(report, link)
    assert young.exists()
    assert fresh.exists()


def test_unpacked_files_are_removed_once_their_image_is_gone() -> None:
    """Files unpacked for gVisor are removed if a process left them incomplete, or if their image is gone."""
    store.images_dir().joinpath("b" * 64).mkdir(parents=True)
    folder = store.images_dir().parent / "gvisor"
    for name in (".new-1", "a" * 64, "b" * 64):
        folder.joinpath(name, "etc").mkdir(parents=True)
        os.utime(folder / name, (0, 0))
    report = prune(["cache"], progress=lambda _text: None, dry_run=False)
    assert {Path(one.path).name for one in report.removed} == {".new-1", "a" * 64}
    assert {path.name for path in folder.iterdir()} == {"b" * 64}


def test_templates_are_removed_with_their_image() -> None:
    """Templates are removed with their image, and results of tests once they have expired, also in a dry run."""
    named, old = image("default"), image(size=1000)
    templates = store.images_dir().parent / "templates"
    templates.mkdir(mode=0o700)
    part = {"file": "ram", "sha256": "0" * 64, "bytes": 1}
    for key, made in (("a" * 64, named), ("b" * 64, old)):
        (templates / key).mkdir(mode=0o700)
        files = {"ram": part, "state": part, "scratch": part, "scratch_disk": {"bytes": 1, "pieces": []}}
        document = {"schema_version": "x", "key": key, "image": made.digest, "made": {"type": "vm", **files}}
        (templates / key / "manifest.json").write_text(json.dumps(document))
    valid, expired, foreign = (Verdict("verified", name) for name in ("valid", "expired", "foreign"))
    for verdict in (valid, foreign):
        verdict.write({"files": {}})
    expired.path.write_text('{"boot_id": "another", "files": {}}')
    foreign.path.rename(foreign.path.with_name("notes.json"))
    (templates / ".new-left").mkdir()
    (templates / ".new-left" / "ram").touch()
    expected = {old.folder, templates / ("b" * 64), templates / ".new-left", expired.path}
    assert paths(swept(dry_run=True)) == {str(path) for path in expected}
    report = swept()
    assert paths(report) >= {str(path) for path in expected}
    assert not any(path.exists() for path in expected)
    assert (templates / ("a" * 64)).is_dir()
    assert sorted(path.name for path in valid.path.parent.iterdir()) == sorted([valid.path.name, "notes.json"])


# the command


@pytest.fixture
def full() -> list[Path]:
    """One removable item of each part."""
    old = image()
    artifacts = store.images_dir().parent / "artifacts"
    artifacts.mkdir(mode=0o700)
    artifact = artifacts / artifact_key("old")
    artifact.write_bytes(bytes(10_000))
    age(artifact, 8)
    return [old.folder, artifact, job(8).folder]


def command(*words: str) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON of `x07 prune`."""
    done = x07(Path.cwd(), "prune", "--json", *words)
    assert done.err == ""
    return done.code, document(done.out)


@pytest.mark.parametrize("words", [("--images",), ("--cache",), ("--runs",), ("--images", "--runs"), ()])
def test_a_switch_names_the_part(full: list[Path], words: tuple[str, ...]) -> None:
    """--images, --cache and --runs select what is pruned; without them everything is."""
    chosen = {
        path for path, part in zip(full, ("--images", "--cache", "--runs"), strict=True) if part in words or not words
    }
    code, report = command(*words)
    assert code == 0
    assert {path for path in full if not path.exists()} == chosen
    assert {str(path) for path in chosen} <= {removed["path"] for removed in report["removed"]}


def test_a_dry_run_reports_the_same(full: list[Path]) -> None:
    """--dry-run removes nothing and reports exactly what a real run would."""
    code, dry = command("--dry-run")
    assert (code, dry["dry_run"]) == (0, True)
    assert all(path.exists() for path in full)
    code, real = command()
    assert {**real, "dry_run": True} == dry


def test_the_output_lists_items_and_sizes(full: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """The output has one line for each item with size and reason, and the total."""
    assert main(["prune", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"would remove image {full[0]} " in lines[0]
    assert lines[-1].startswith(f"would remove {len(lines) - 1} items, ")
    assert lines[-1].endswith("KiB")


def test_nothing_there_is_no_error(tmp_path: Path) -> None:
    """On an unused host prune removes nothing and creates nothing."""
    code, report = command()
    assert (code, report["removed"], report["kept"], report["bytes"]) == (0, [], [], 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("which", ["cache", "vm"])
def test_a_planted_link_in_place_of_our_folders_is_refused(full: list[Path], tmp_path: Path, which: str) -> None:
    """A symbolic link in place of the state or cache folder is refused."""
    (tmp_path / which).rename(tmp_path / "real")
    (tmp_path / which).symlink_to(tmp_path / "real")
    done = x07(tmp_path, "prune")
    assert done.code == 125
    assert "it is a link or not a folder" in done.err
    moved = [path.relative_to(tmp_path / which) for path in full if path.is_relative_to(tmp_path / which)]
    assert all((tmp_path / "real" / path).exists() for path in moved)


def test_an_undeletable_item_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An item that cannot be removed is reported, and the exit code is 1."""
    record = job(8)

    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path == record.folder:  # as the kernel does where it is immutable
            raise PermissionError(1, "Operation not permitted")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    assert main(["prune", "--runs"]) == 1
    assert f"kept job {record.folder}: it cannot be removed: Operation not permitted" in capsys.readouterr().out


def test_a_tree_deeper_than_the_stack_is_counted(tmp_path: Path) -> None:
    """Disk usage counts folders that a program nested more deeply than Python can recurse."""
    deep, depth = tmp_path / "deep", 1500
    subprocess.run(["/bin/mkdir", "-p", f"{deep}/{'/'.join('d' * depth)}"], check=True)
    try:
        assert len(list(everything(deep))) == depth + 1
    finally:
        subprocess.run(["/bin/rm", "-rf", deep], check=True)
