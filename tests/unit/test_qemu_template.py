"""VM templates: whether there is space for one, and what speaks against one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from x07_sandbox.backends.qemu.template import Template, lack_of_space, templates_dir, trust_all
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


def test_what_spoke_against_a_template_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that is not trusted is so until all are trusted again, whatever machines they are of."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    templates = [Template(key=key, folder=templates_dir() / key) for key in ("a" * 64, "b" * 64)]
    for template in templates:
        template.distrust("a clone of it did not answer")
    assert [template.bad() for template in templates] == ["a clone of it did not answer"] * 2
    trust_all()
    assert [template.bad() for template in templates] == ["", ""]
