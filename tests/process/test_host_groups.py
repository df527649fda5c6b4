"""Control groups on the host that killed processes have left."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import need
from x07_sandbox.host.waiting import unix_ms
from x07_sandbox.jail.resources import make_groups, remove_abandoned_groups

pytestmark = pytest.mark.root


def test_only_groups_of_dead_processes_are_removed() -> None:
    """An empty group stays while the process that made it lives: the last one in its name, since a pause moves it."""
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    gone, here, run = int(dead.stdout), os.getpid(), unix_ms()
    kept = [f"{run}-{here}-901-run", f"{run}-{gone}-902-run-2-{here}"]
    abandoned = [f"{run}-{gone}-903-run", f"{run}-{here}-904-run-2-{gone}"]
    made = {name: make_groups(name, memory_bytes=1 << 30, tasks=16) for name in (*kept, *abandoned)}
    try:
        need(all(groups.folders for groups in made.values()), "control groups", installable=False)
        remove_abandoned_groups()
        for name, groups in made.items():
            assert all(folder.exists() == (name in kept) for folder in groups.folders), name
    finally:
        for groups in made.values():
            groups.remove()
