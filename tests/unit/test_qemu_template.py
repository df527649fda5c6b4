"""VM templates: required disk space, distrust, integrity and eviction."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import msgspec
import pytest

from x07_sandbox.backends.qemu.template import (
    MANIFEST,
    SCHEMA,
    SUSPENDED,
    Template,
    TemplateManifest,
    delete_unused,
    ensure,
    expired_templates,
    lack_of_space,
    opened_template,
    sealed,
    sparse_sha256,
    templates_dir,
)
from x07_sandbox.errors import ImageError
from x07_sandbox.host.linux import boot_ms
from x07_sandbox.host.locks import lock_for_removal
from x07_sandbox.host.verdicts import forget
from x07_sandbox.host.waiting import Remark, unix_ms
from x07_sandbox.images.store import Part, Piece, ScratchDisk
from x07_sandbox.policy.guest import RAM_CLASSES

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
    late, ended = (Template(key=key, folder=templates_dir() / key) for key in ("a" * 64, "b" * 64))
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
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Template:
    """A template of small parts."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    key = "a" * 64
    template = Template(key=key, folder=templates_dir() / key)
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
    made = TemplateManifest(
        schema_version=SCHEMA,
        key=key,
        image="sha256:x",
        ram=parts["ram"],
        state=parts["state"],
        scratch=parts["scratch"],
        scratch_disk=disk,
    )
    (template.folder / MANIFEST).write_bytes(msgspec.json.encode(sealed(made)))
    (template.folder / MANIFEST).chmod(0o444)
    return template


def expired(keep: str = "", most_bytes: int = 1 << 30) -> list[Path]:
    """The folders of the templates that can be removed."""
    return [folder for folder, _ in expired_templates(keep=keep, images={"sha256:x"}, most_bytes=most_bytes)]


def test_all_templates_together_have_one_limit_of_size(saved: Template) -> None:
    """All saved VMs share one limit, which counts what they take on the disk: a hole takes nothing."""
    older = saved.folder.with_name("b" * 64)
    shutil.copytree(saved.folder, older)
    with (older / "ram").open("r+b") as file:
        file.truncate(1 << 40)
    each = int(subprocess.run(["/usr/bin/du", "-s", "-B1", older], capture_output=True, check=True).stdout.split()[0])
    assert expired(saved.key, 2 * each) == []
    assert expired(saved.key, 2 * each - 1) == [older]


def test_an_unused_template_expires(saved: Template) -> None:
    """A saved VM that no run used for 7 days can be removed, however little space all take."""
    assert expired() == []
    os.utime(saved.folder, (unix_ms() / 1000 - 8 * 86_400,) * 2)
    assert expired() == [saved.folder]
    with opened_template(saved):
        pass
    assert expired() == []


def test_a_template_in_use_stays(saved: Template) -> None:
    """A saved VM that a live VM uses is not removed, and a run does not start from one that is being removed."""
    with opened_template(saved) as files:
        assert files is not None
        assert expired(most_bytes=0) == []
        with pytest.raises(BlockingIOError):
            delete_unused(saved.folder)
    with lock_for_removal(saved.folder), opened_template(saved) as files:
        assert files is None
    assert expired(most_bytes=0) == [saved.folder]
    delete_unused(saved.folder)
    assert list(templates_dir().iterdir()) == []


def test_the_least_used_templates_go_and_the_user_is_told(
    saved: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a VM is saved, the least recently used saved VMs above the limit go, and a line says so."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "x07").mkdir()
    (tmp_path / "x07" / "sandbox.toml").write_text("[disk]\nsaved_vms_mib = 3\n")
    (saved.folder / "large").write_bytes(bytes(2 << 20))
    older = saved.folder.with_name("b" * 64)
    shutil.copytree(saved.folder, older)
    os.utime(older, (unix_ms() / 1000 - 3600,) * 2)
    made = msgspec.json.decode((saved.folder / MANIFEST).read_bytes(), type=TemplateManifest)
    said: list[str] = []
    new = Template(key="c" * 64, folder=templates_dir() / ("c" * 64))
    ensure(new, lambda _work: msgspec.structs.replace(made, key=new.key), "saving", said.append)
    assert {path.name[0] for path in templates_dir().iterdir()} == {".", "a", "c"}
    why = "all take more space than [disk] saved_vms_mib allows, and others were used more recently"
    assert [line for line in said if isinstance(line, Remark)] == [f"removed saved VMs (1, with 2 MiB): {why}"]


def test_a_templates_manifest_is_held_by_its_digest(saved: Template) -> None:
    """A changed template manifest is detected by its digest."""
    with opened_template(saved) as files:
        assert files is not None
        assert [piece.offset for piece in files.scratch_disk.pieces] == [0, 4096]
    path = saved.folder / MANIFEST
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data.replace(b"4096", b"8192"))
    path.chmod(0o444)
    with pytest.raises(ImageError, match="has changed"), opened_template(saved):
        pass
