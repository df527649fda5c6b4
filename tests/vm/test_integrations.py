"""The tests of one framework, in an environment of its own; `scripts/test.sh --integrations` runs all of them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(600)]


def test_the_pytest_plugin_passes_its_tests() -> None:
    """The script makes an environment with the framework, and the tests in it pass."""
    words = [str(ROOT / "scripts" / "test_integrations.sh"), "pytest"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout
