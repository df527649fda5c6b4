"""Messages from the pool's process to its starter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

from x07_sandbox.library.pool_server import Starter

if TYPE_CHECKING:
    from pathlib import Path


def test_nothing_is_written_after_the_start() -> None:
    """The pool's process writes nothing to its starter's descriptor after the start."""
    read_fd, write_fd = os.pipe()
    starter = Starter(write_fd)
    starter.report({"progress": "making"})
    starter.close()
    with os.fdopen(read_fd, "rb") as pipe:
        assert [json.loads(line) for line in pipe] == [{"progress": "making"}]
    other_r, other_w = os.pipe()
    assert write_fd in {other_r, other_w}
    starter.report({"progress": "making another"})
    starter.close()
    os.close(other_w)  # which is still open
    assert os.read(other_r, 100) == b""
    os.close(other_r)


def test_a_failed_start_gives_the_reason(tmp_path: Path) -> None:
    """`x07 pool start` reports why the pool's process cannot start."""
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
