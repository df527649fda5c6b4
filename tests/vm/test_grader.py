"""examples/grader.py in full size: the verdicts of 200 submissions."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
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

# Far longer than it takes to end them, in rounds of as many as there are machines.
SLEEPERS: Final = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import grader
grader.SUBMISSIONS = (("python", "import time; time.sleep(9)"),)
grader.main()
"""

pytestmark = [pytest.mark.vm, pytest.mark.timeout(3600)]


def test_ctrl_c_ends_the_grader_and_its_machines(image: Image, state: Path) -> None:
    """Ctrl-C ends the grader without waiting for running submissions, and leaves no machine."""
    assert image.digest
    argv = [sys.executable, "-c", SLEEPERS, str(GRADER.parent), "200"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while len([*state.glob("*-run*/job.json")]) < 2 and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert errors.endswith("KeyboardInterrupt\n")
    assert left_behind(state) == []


def test_an_invalid_number_is_a_usage_error() -> None:
    """An invalid number of submissions ends the grader with its usage and exit code 2."""
    done = subprocess.run([sys.executable, str(GRADER), "many"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "invalid int value: 'many'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_two_hundred_submissions_get_their_verdicts(image: Image, state: Path, *, full: bool) -> None:
    """The grader gives 200 hostile, wrong and right submissions the right verdict, and leaves no remains (--full)."""
    assert sum(VERDICTS.values()) == 200
    if not full:
        pytest.skip("takes minutes; scripts/test.sh --full runs it, examples/README.md runs it with 12")
    assert image.digest
    done = subprocess.run([sys.executable, str(GRADER)], capture_output=True, text=True, check=False, timeout=3500)
    assert (done.returncode, done.stderr) == (0, "")
    head, *rows = done.stdout.splitlines()
    assert head.split() == ["verdict", "submissions"]
    assert {row[:14].strip(): int(row[14:]) for row in rows} == VERDICTS
    assert left_behind(state) == []
