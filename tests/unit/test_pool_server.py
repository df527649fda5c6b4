"""Messages from the pool's process to its starter."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

from tests.command import X07
from x07_sandbox.library.resident import Progress, Reader, Starter, Starting

if TYPE_CHECKING:
    from pathlib import Path


def test_nothing_is_written_after_the_start() -> None:
    """A resident process writes nothing to its starter's descriptor after the start."""
    read_fd, write_fd = os.pipe()
    starter = Starter(write_fd)
    starter.report(Progress.of("making"))
    starter.close()
    with os.fdopen(read_fd, "rb") as pipe:
        reader: Reader[Starting] = Reader(Starting)
        assert reader.take(pipe.read()) == [Progress("making", notice=False)]
    other_r, other_w = os.pipe()
    assert write_fd in {other_r, other_w}
    assert starter.report(Progress.of("making another"))
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
    argv = [*X07, "pool", "start"]
    done = subprocess.run(
        argv, env=os.environ | {"X07_VM_CACHE_DIR": str(cache)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 125
    assert "socket: Is a directory. Remove it" in done.stderr
