"""Types that data is decoded to."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from x07_sandbox.policy.decode import default_policy, render_policy

if TYPE_CHECKING:
    from pathlib import Path

# Threads that are the first to use a type, and take turns as often as Python lets them.
AT_ONCE = """
import pathlib, sys, threading
from x07_sandbox.policy.decode import decode_policy
from x07_sandbox.policy.schema import range_of
sys.setswitchinterval(1e-6)
data = pathlib.Path(sys.argv[1]).read_bytes()
together, read = threading.Barrier(8), []
def use(number):
    together.wait()
    read.append(decode_policy(data, source="it") if number % 2 else range_of("limits.wall_ms"))
threads = [threading.Thread(target=use, args=[number]) for number in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len(read) == 8
"""


def test_threads_may_be_the_first_to_decode(tmp_path: Path) -> None:
    """Several threads may decode a type, or ask for its schema, for the first time at once."""
    path = tmp_path / "policy.json"
    path.write_bytes(render_policy(default_policy()))
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", AT_ONCE, path], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
