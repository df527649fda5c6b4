"""The number of usable cores under CPU affinity and cgroup quotas."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from x07_sandbox.host.memory import cores

if TYPE_CHECKING:
    from pathlib import Path

HERE = 8


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/\n", {}, HERE),
        ("0::/\n", {"cpu.max": "max 100000\n"}, HERE),
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/a/b\n", {"a/cpu.max": "150000 100000\n", "a/b/cpu.max": "max 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "5000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "6400000 100000\n"}, HERE),
        ("3:cpu,cpuacct:/b\n", {"cpu/b/cpu.cfs_quota_us": "300000\n", "cpu/b/cpu.cfs_period_us": "100000\n"}, 3),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, HERE),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "1000\n"}, HERE),
    ],
)
def test_a_control_group_may_allow_fewer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, limits: dict[str, str], expected: int
) -> None:
    """The usable cores are the minimum of affinity and all cgroup quotas, v1 and v2."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(HERE)))
    for name, text in ({"proc/self/cgroup": groups} | {f"sys/fs/cgroup/{n}": t for n, t in limits.items()}).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert cores(tmp_path) == expected
