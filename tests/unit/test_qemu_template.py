"""VM templates: required disk space, distrust, integrity and eviction."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import ExitStack
from typing import TYPE_CHECKING, Literal

import msgspec
import pytest

from x07_sandbox.backends.base import MachineKind, Note
from x07_sandbox.backends.qemu.saved import (
    MANIFEST,
    SUSPENDED,
    Manifest,
    NewFolder,
    SavedVm,
    delete_unused,
    ensure,
    expired,
    kept_snapshots,
    lack_of_space,
    leftovers,
    new_folder,
    sparse_sha256,
    templates_dir,
)
from x07_sandbox.backends.qemu.template import VmTemplate
from x07_sandbox.errors import ImageError, RefusedError
from x07_sandbox.host.linux import boot_ms
from x07_sandbox.host.locks import lock_for_removal
from x07_sandbox.host.verdicts import forget
from x07_sandbox.host.waiting import Remark, unix_ms
from x07_sandbox.images.store import Part, Piece, ScratchDisk
from x07_sandbox.policy.guest import RAM_CLASSES
from x07_sandbox.records.runs import SANDBOX, SandboxRecord

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20


@pytest.mark.parametrize(
    ("ram_bytes", "measured_mib"),  # only of a build's machine
    [(RAM_CLASSES[0], 175), (RAM_CLASSES[1], 379), (RAM_CLASSES[2], 528)],
)
def test_a_template_is_made_only_where_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ram_bytes: int, measured_mib: int
) -> None:
    """A template is made only if the disk has enough space."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    values = list(os.statvfs(tmp_path))
    monkeypatch.setattr(os, "statvfs", lambda _path: os.statvfs_result(values))
    for free_mib, fits in ((measured_mib, False), (1024, True)):
        values[1], values[4] = MIB, free_mib  # f_frsize, f_bavail
        assert (lack_of_space(ram_bytes) == "") is fits


def test_a_distrusted_template_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template whose clone timed out is distrusted for five minutes; one whose clone ended, until trust is reset."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    late, ended = (VmTemplate(key=key, folder=templates_dir() / key) for key in ("a" * 64, "b" * 64))
    reason = late.suspend("a clone of it did not answer in time", transient=True)
    assert "boot a new VM for 5 minutes" in reason
    assert late.suspended() == reason
    ended.suspend("a clone of it ended", transient=False)
    now_ms = boot_ms()
    monkeypatch.setattr("x07_sandbox.host.verdicts.boot_ms", lambda: now_ms + 301_000)
    assert late.suspended() == ""
    assert ended.suspended().startswith("a clone of it ended. Such jobs boot a new VM until this host reboots")
    forget(SUSPENDED)
    assert ended.suspended() == ""


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VmTemplate:
    """A template of small parts."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    key = "a" * 64
    template = VmTemplate(key=key, folder=templates_dir() / key)
    template.folder.mkdir(mode=0o700)
    parts = {}
    for name in ("ram", "state", "scratch"):
        path = template.folder / name
        path.write_bytes(name.encode())
        path.chmod(0o444)
        with path.open("rb") as file:
            size = path.stat().st_size
            parts[name] = Part(file=name, bytes=size, sha256=sparse_sha256(file.fileno(), size))
    disk = ScratchDisk(bytes=1 << 20, pieces=[Piece(offset=0, bytes=3), Piece(offset=4096, bytes=4)])
    Manifest(key=key, image="sha256:x", made=SavedVm(**parts, scratch_disk=disk)).write(template.folder)
    return template


def expired_of(keep: str = "", most_bytes: int = 1 << 30) -> list[Path]:
    """The folders of the templates that can be removed."""
    return [folder for folder, _ in expired(keep=keep, images={"sha256:x"}, most_bytes=most_bytes)]


def test_all_templates_together_have_one_limit_of_size(saved: VmTemplate) -> None:
    """All saved VMs share one limit, which counts what they take on the disk: a hole takes nothing."""
    older = saved.folder.with_name("b" * 64)
    shutil.copytree(saved.folder, older)
    with (older / "ram").open("r+b") as file:
        file.truncate(1 << 40)
    each = int(subprocess.run(["/usr/bin/du", "-s", "-B1", older], capture_output=True, check=True).stdout.split()[0])
    assert expired_of(saved.key, 2 * each) == []
    assert expired_of(saved.key, 2 * each - 1) == [older]


def test_an_unused_template_expires(saved: VmTemplate) -> None:
    """A saved VM that no run used for 7 days can be removed, however little space all take."""
    assert expired_of() == []
    os.utime(saved.folder, (unix_ms() / 1000 - 8 * 86_400,) * 2)
    assert expired_of() == [saved.folder]
    with saved.opened():
        pass
    assert expired_of() == []


def test_a_template_in_use_stays(saved: VmTemplate) -> None:
    """A saved VM that a live VM uses is not removed, and a run does not start from one that is being removed."""
    with saved.opened() as files:
        assert files is not None
        assert expired_of(most_bytes=0) == []
        with pytest.raises(BlockingIOError):
            delete_unused(saved.folder)
    with lock_for_removal(saved.folder), saved.opened() as files:
        assert files is None
    assert expired_of(most_bytes=0) == [saved.folder]
    delete_unused(saved.folder)
    assert list(templates_dir().iterdir()) == []


def test_the_least_used_templates_go_and_the_user_is_told(
    saved: VmTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a VM is saved, the least recently used saved VMs above the limit go, and a line says so."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "x07").mkdir()
    (tmp_path / "x07" / "sandbox.toml").write_text("[disk]\nsaved_vms_mib = 3\n")
    (saved.folder / "large").write_bytes(bytes(2 << 20))
    older = saved.folder.with_name("b" * 64)
    shutil.copytree(saved.folder, older)
    os.utime(older, (unix_ms() / 1000 - 3600,) * 2)
    made = msgspec.json.decode((saved.folder / MANIFEST).read_bytes(), type=Manifest)
    said: list[str] = []
    new = VmTemplate(key="c" * 64, folder=templates_dir() / ("c" * 64))
    ensure(new, lambda _work: msgspec.structs.replace(made, key=new.key), "saving", said.append)
    assert {path.name[0] for path in templates_dir().iterdir()} == {".", "a", "c"}
    why = "all take more space than [disk] saved_vms_mib allows, and others were used more recently"
    assert [line for line in said if isinstance(line, Remark)] == [f"removed saved VMs (1, with 2 MiB): {why}"]


def test_a_templates_manifest_is_held_by_its_digest(saved: VmTemplate) -> None:
    """A changed template manifest is detected by its digest."""
    with saved.opened() as files:
        assert files is not None
    path = saved.folder / MANIFEST
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data.replace(b"4096", b"8192"))
    path.chmod(0o444)
    with pytest.raises(ImageError, match="has changed"), saved.opened():
        pass


def snapshot(keep: Literal["kept", "paused", "open"], run: Path, number: int = 0) -> tuple[Note, NewFolder, ExitStack]:
    """A snapshot of 1 MiB, and what ends the context of its folder."""
    stack = ExitStack()
    folder = stack.enter_context(new_folder())
    (folder.path / "ram").write_bytes(bytes(MIB))
    note = Note(id=f"{number:012x}", name="", sandbox="1-2-3", folder=str(run), created_unix_ms=1, keep=keep)
    return note, folder, stack


@pytest.fixture
def run(saved: VmTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a sandbox that is paused as 0, with settings that allow saved VMs 4 MiB."""
    del saved
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "x07").mkdir()
    (tmp_path / "x07" / "sandbox.toml").write_text("[disk]\nsaved_vms_mib = 4\n")
    record = SandboxRecord(
        name="", tags={}, opened_unix_ms=1, until_unix_ms=2, backend="qemu", image=None, paused=f"{0:012x}"
    )
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / SANDBOX).write_bytes(msgspec.json.encode(record))
    return folder


KIND = MachineKind(image=None, ram_bytes=RAM_CLASSES[0])


def test_what_a_paused_sandbox_needs_is_never_removed(run: Path) -> None:
    """The snapshot of a paused sandbox stays for 7 days, also without its image, until it is resumed or closed."""
    note, folder, stack = snapshot("paused", run)
    with stack:
        folder.keep(note, KIND)
    assert folder.path not in expired_of(most_bytes=0)
    assert [one.note for one in kept_snapshots()] == [note]
    record = (run / SANDBOX).read_bytes()
    (run / SANDBOX).unlink()
    assert folder.path in expired_of()
    (run / SANDBOX).write_bytes(record)
    os.utime(folder.path, (unix_ms() / 1000 - 8 * 86_400,) * 2)
    assert folder.path in expired_of()


def test_checkpoints_count_and_end_with_their_sandbox(run: Path) -> None:
    """Checkpoints share the limit of saved VMs: others make room, and one that has none left is refused."""
    stacks = []
    for number in (1, 2, 3):
        note, folder, stack = snapshot("open", run, number)
        folder.keep(note, KIND)
        stacks.append((folder, stack))
        assert folder.path not in expired_of(most_bytes=0)
    assert {one.note.id for one in kept_snapshots()} == {f"{number:012x}" for number in (1, 2, 3)}
    note, folder, stack = snapshot("open", run, 4)
    with stack, pytest.raises(RefusedError, match="would take 4 MiB, and may take 4 MiB") as raised:
        folder.keep(note, KIND)
    assert raised.value.code == "no-disk-room"
    stacks[0][1].close()
    assert not stacks[0][0].path.exists()
    shutil.copytree(stacks[1][0].path, templates_dir() / ("d" * 64))  # nobody has locked it, as after a kill
    assert expired_of() == [templates_dir() / ("d" * 64)]
    for _, stack in stacks[1:]:
        stack.close()


def test_what_killed_processes_left_is_known_at_once(saved: VmTemplate) -> None:
    """A folder that a killed process was filling is a leftover; one that is being filled, or is new, is none."""
    with snapshot("kept", saved.folder)[2]:
        assert leftovers() == []
    (templates_dir() / ".new-empty").mkdir()
    assert leftovers() == []
    (templates_dir() / ".new-full").mkdir()
    (templates_dir() / ".new-full" / "ram").write_bytes(b"x")
    assert leftovers() == [templates_dir() / ".new-full"]
