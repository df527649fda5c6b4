"""The tests work under nohup and in a script's background, where signals are ignored."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHOWS = "import signal; print(*(signal.getsignal(n) is signal.SIG_IGN for n in (signal.SIGINT, signal.SIGHUP)))"


def test_programs_of_the_tests_inherit_no_ignored_signal() -> None:
    """Programs started by tests inherit no ignored signal."""
    started = f"subprocess.run([sys.executable, '-c', {SHOWS!r}])"
    starts = f"import runpy, subprocess, sys; runpy.run_path('tests/conftest.py'); {started}"
    ignoring = ["/bin/sh", "-c", 'trap "" INT HUP; exec "$@"', "sh"]
    ended = subprocess.run([*ignoring, sys.executable, "-c", starts], cwd=ROOT, capture_output=True, check=True)
    assert ended.stdout.split() == [b"False", b"False"]
    bare = subprocess.run([*ignoring, sys.executable, "-c", SHOWS], capture_output=True, check=True)
    assert bare.stdout.split() == [b"True", b"True"]
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
