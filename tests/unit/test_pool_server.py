"""What the pool's process tells whoever started it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

from x07_sandbox.pool.server import Starter

if TYPE_CHECKING:
    from pathlib import Path


def test_nothing_is_told_once_the_start_is_over() -> None:
    """Progress after the start is written nowhere, whatever has the descriptor's number by then."""
    read_fd, write_fd = os.pipe()
    starter = Starter(write_fd)
    starter.report({"progress": "making"})
    starter.close()
    with os.fdopen(read_fd, "rb") as told:
        assert [json.loads(line) for line in told] == [{"progress": "making"}]
    other_r, other_w = os.pipe()
    assert write_fd in {other_r, other_w}
    starter.report({"progress": "making another"})
    starter.close()
    os.close(other_w)  # which is still open
    assert os.read(other_r, 100) == b""
    os.close(other_r)


def test_a_start_that_the_system_hinders_says_so(tmp_path: Path) -> None:
    """What stands in the way of the pool's process is told by `x07 pool start`, with what to do about it."""
    cache = tmp_path / "cache"
    (cache / "pool" / "socket").mkdir(parents=True)
    for folder in (cache, cache / "pool"):
        folder.chmod(0o700)
    argv = [sys.executable, "-m", "x07_sandbox.cli.main", "pool", "start"]
    done = subprocess.run(
        argv, env=os.environ | {"X07_VM_CACHE_DIR": str(cache)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 125
    assert "socket: Is a directory. Remove it" in done.stderr
