"""The usable memory under cgroup limits."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from x07_sandbox.host.memory import memory_bytes

if TYPE_CHECKING:
    from pathlib import Path

ALL = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
MIB = 1 << 20


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("", {}, ALL),
        ("0::/\n", {}, ALL),
        ("0::/\n", {"memory.max": "max\n"}, ALL),
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
    for name, text in ({"proc/self/cgroup": groups} | {f"sys/fs/cgroup/{n}": t for n, t in limits.items()}).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert memory_bytes(tmp_path) == expected
