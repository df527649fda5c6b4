"""The scratch disk: a valid ext4 file system, small and reproducible."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

from x07_sandbox.images import scratch

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Need


def test_disk_from_the_head_is_a_sound_file_system(tmp_path: Path, need: Need) -> None:
    """The scratch disk passes e2fsck and is reproducible."""
    need(shutil.which("mke2fs", path="/usr/sbin:/sbin"), "mke2fs (package e2fsprogs)", installable=True)
    head, disk = scratch.make_head(tmp_path)
    assert (head, disk) == scratch.make_head(tmp_path)
    assert len(head) < 256 * 1024
    assert disk.bytes == 8 * 1024**3
    (tmp_path / "head").write_bytes(head)
    with (tmp_path / "head").open("rb") as part, (tmp_path / "disk").open("w+b") as file:
        scratch.write_disk(part.fileno(), disk, file.fileno())
    checked = subprocess.run(
        ["/usr/sbin/e2fsck", "-fn", str(tmp_path / "disk")], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert list(tmp_path.glob("scratch-*")) == []
