"""examples/grader.py in full size: what 200 submissions must come to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.vm.conftest import left_behind

if TYPE_CHECKING:
    from x07_sandbox.images.store import Image

GRADER: Final = Path(__file__).resolve().parents[2] / "examples" / "grader.py"
# Twelve kinds in turn: of the first eight there are 17, of the other four 16.
VERDICTS: Final = {
    "accepted": 4 * 17,
    "cpu-limit": 2 * 17,
    "build-failed": 17,
    "wrong answer": 17,
    "failed": 16,
    "oom": 16,
    "output-limit": 16,
    "signalled": 16,
}

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(3600)]


def test_two_hundred_submissions_get_their_verdicts(image: Image, state: Path, *, full: bool) -> None:
    """The grader gives each of 200 hostile, wrong and right submissions its verdict, and leaves nothing (--full)."""
    assert sum(VERDICTS.values()) == 200
    if not full:
        pytest.skip("takes minutes; scripts/test.sh --full runs it, docs/programs.md runs it with 12")
    assert image.digest
    done = subprocess.run([sys.executable, str(GRADER)], capture_output=True, text=True, check=False, timeout=3500)
    assert (done.returncode, done.stderr) == (0, "")
    head, *rows = done.stdout.splitlines()
    assert head.split() == ["verdict", "submissions"]
    assert {row[:14].strip(): int(row[14:]) for row in rows} == VERDICTS
    assert left_behind(state) == []
