"""The commands of docs/reference/x07.md, run as a reader would type them."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("image", "state")]


def _run_line(line: str) -> dict[str, object]:
    """Run one line in the project's folder, and return the object that it prints."""
    done = subprocess.run(
        line.split(), cwd=ROOT, capture_output=True, timeout=300, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    printed: dict[str, object] = json.loads(done.stdout)
    return printed


def _output(report: dict[str, object]) -> str:
    match report:
        case {"solve": {"solve_output_b64": str(text)}}:
            return base64.b64decode(text).decode()
        case _:
            pytest.fail("the report has no output")


def test_the_c_example_reports_its_output() -> None:
    """The page's C example reports the word counts."""
    line = (
        ".venv/bin/x07-os-runner --world run-os-sandboxed --policy examples/policy.json "
        "--program examples/word_frequency.c --input examples/text.txt"
    )
    assert "5 the" in _output(_run_line(line))


def test_the_python_example_reports_its_output() -> None:
    """The page's Python example reports the CSV."""
    line = (
        ".venv/bin/x07-os-runner --world run-os-sandboxed --policy examples/policy.json "
        "--program examples/jsonl_to_csv.py --input examples/orders.jsonl"
    )
    assert _output(_run_line(line)).startswith("id,customer.name,")


def test_the_command_line_is_described_as_json() -> None:
    """The page's third command prints the description of the command line as JSON."""
    assert _run_line(".venv/bin/x07-os-runner --cli-specrows")["schema_version"] == "x07cli.specrows@0.1.0"
