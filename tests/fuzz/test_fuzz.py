"""Fuzz targets for everything that reads hostile bytes, with kept inputs and a coverage-guided fuzzer."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.conftest import FULL, need
from tests.fuzz.targets import NAMES, target

ROOT: Final = Path(__file__).resolve().parents[2]
SEEDS: Final = {f"{name}/{seed}": data for name in NAMES for seed, data in target(name).seeds().items()}
RUNS: Final = 200_000 if FULL else 2_000
# Each input makes and reads several policies: this many take as long as the inputs of the others.
RUNS_OBSERVED: Final = RUNS // 8


@pytest.mark.parametrize("name", SEEDS)
def test_seeds_and_former_failures_pass(name: str) -> None:
    """Every seed, and every input that once broke an invariant, passes its target's checks."""
    target(name.partition("/")[0]).one_input(SEEDS[name])


@pytest.mark.parametrize("name", NAMES)
def test_the_fuzzer_finds_nothing(name: str, tmp_path: Path) -> None:
    """The coverage-guided fuzzer finds no violation in thousands of inputs."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    found = importlib.util.find_spec("atheris") is not None
    # requirements/dev.in omits it where it has no wheel, so that no package can install it there.
    need(found, f"atheris has no wheel for this machine or Python {version}", installable=False)
    runs = RUNS_OBSERVED if name == "observed" else RUNS
    command = [sys.executable, "-m", "tests.fuzz.run", name, str(tmp_path / "corpus"), f"-artifact_prefix={tmp_path}/"]
    command += [f"-runs={runs}", "-max_len=4096", "-rss_limit_mb=2048"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
    inputs = {path.name: path.read_bytes()[:200] for path in tmp_path.iterdir() if path.is_file()}
    assert done.returncode == 0, f"{inputs}\n{done.stderr[-3000:]}"
    counted = re.search(r"Done (\d+) runs", done.stderr)
    assert counted is not None, done.stderr[-3000:]
    assert int(counted[1]) >= runs  # libFuzzer may carry out a few more
