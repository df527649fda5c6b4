"""Whether there is space for a VM template."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from x07_sandbox.backends.qemu.template import lack_of_space
from x07_sandbox.plan.sizes import RAM_CLASSES

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20


@pytest.mark.parametrize(
    ("ram_bytes", "measured_mib"),  # of a build's machine where there is one
    [(RAM_CLASSES[0], 149), (RAM_CLASSES[1], 175), (RAM_CLASSES[2], 379), (RAM_CLASSES[3], 528)],
)
def test_a_template_is_made_only_where_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ram_bytes: int, measured_mib: int
) -> None:
    """On a disk with a little less space than a template of any size was measured to take none is begun."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    values = list(os.statvfs(tmp_path))
    monkeypatch.setattr(os, "statvfs", lambda _path: os.statvfs_result(values))
    for free_mib, fits in ((measured_mib, False), (1024, True)):
        values[1], values[4] = MIB, free_mib  # f_frsize, f_bavail
        assert (lack_of_space(ram_bytes) == "") is fits
