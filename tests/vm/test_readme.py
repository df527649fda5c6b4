"""The README's commands, run as a reader would type them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.vm


def _run_line(line: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Run one line of the README in the project's folder with empty standard input."""
    return subprocess.run(
        line.split(), cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL, check=False
    )


def test_quickstart_ends_with_the_output_of_both_examples() -> None:
    """scripts/quickstart.sh succeeds when run again, and shows the output of both examples."""
    done = _run_line("scripts/quickstart.sh")
    assert done.returncode == 0, done.stderr
    assert "customer.name" in done.stdout
    assert "5 the" in done.stdout


def test_test_script_is_what_ci_runs() -> None:
    """CI runs scripts/test.sh, which runs this test."""
    script = ROOT / "scripts/test.sh"
    assert os.access(script, os.X_OK)
    assert "scripts/test.sh" in (ROOT / ".ci/run").read_text(encoding="utf-8")


def test_a_python_program_runs_on_input() -> None:
    """The README's Python example prints the CSV, and nothing on standard error."""
    done = _run_line(".venv/bin/x07 run --input examples/orders.jsonl examples/jsonl_to_csv.py")
    assert done.returncode == 0
    assert done.stdout.startswith("id,customer.name,")
    assert done.stderr == ""
