"""What the pool's process tells whoever started it."""

from __future__ import annotations

import json
import os

from x07_sandbox.runs.pool_server import Starter


def test_nothing_is_told_once_the_start_is_over() -> None:
    """Progress after the start is written nowhere, whatever has the descriptor's number by then."""
    read_fd, write_fd = os.pipe()
    starter = Starter(write_fd)
    starter.tell({"progress": "making"})
    starter.close()
    with os.fdopen(read_fd, "rb") as told:
        assert [json.loads(line) for line in told] == [{"progress": "making"}]
    other_r, other_w = os.pipe()
    assert write_fd in {other_r, other_w}
    starter.tell({"progress": "making another"})
    starter.close()
    os.close(other_w)  # which is still open
    assert os.read(other_r, 100) == b""
    os.close(other_r)
