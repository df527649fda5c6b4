"""The usable memory and cores under CPU affinity, cgroup limits and quotas."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from x07_sandbox.host.linux import cores, memory_bytes, spare_bytes

if TYPE_CHECKING:
    from pathlib import Path

ALL = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
MIB = 1 << 20
HERE = 8


def put(root: Path, groups: str, limits: dict[str, str]) -> None:
    """Write the files of control groups below *root*."""
    for name, text in ({"proc/self/cgroup": groups} | {f"sys/fs/cgroup/{n}": t for n, t in limits.items()}).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/\n", {}, ALL),
        ("0::/\n", {"memory.max": f"{600 * MIB}\n"}, 600 * MIB),
        ("0::/a/b\n", {"a/memory.max": f"{500 * MIB}\n", "a/b/memory.max": "max\n"}, 500 * MIB),
        ("0::/a/b\n", {"a/memory.max": "max\n", "a/b/memory.max": f"{400 * MIB}\n"}, 400 * MIB),
        ("0::/a\n", {"b/memory.max": "1\n"}, ALL),
        ("4:memory:/a\n3:cpu,cpuacct:/b\n", {"memory/a/memory.limit_in_bytes": f"{300 * MIB}\n"}, 300 * MIB),
        ("4:memory:/gone\n", {"memory/memory.limit_in_bytes": f"{200 * MIB}\n"}, 200 * MIB),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": f"{(1 << 63) - 4096}\n"}, ALL),
    ],
)
def test_a_control_group_may_allow_less(tmp_path: Path, groups: str, limits: dict[str, str], expected: int) -> None:
    """The usable memory is the minimum of the host's memory and all cgroup limits, v1 and v2."""
    put(tmp_path, groups, limits)
    assert memory_bytes(tmp_path) == expected


def test_spare_memory_is_what_the_kernel_can_give(tmp_path: Path) -> None:
    """Memory is spare if the host can give it, within the limits of control groups; unknown counts as none."""
    assert spare_bytes(tmp_path) == 0
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable:    2048 kB\n")
    assert spare_bytes(tmp_path) == 2 * MIB
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text(f"{MIB}\n")
    assert spare_bytes(tmp_path) == MIB


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
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
    put(tmp_path, groups, limits)
    assert cores(tmp_path) == expected
