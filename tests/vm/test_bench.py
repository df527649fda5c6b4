"""The benchmark runs whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vm.conftest import copy_cache

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("image")]


@pytest.mark.full("boots or clones a VM for each of 20 cases, and starts containers")
def test_every_case_of_the_benchmark_runs(tmp_path: Path) -> None:
    """The short form of the benchmark runs every case once, and each yields a figure."""
    copy_cache(tmp_path / "cache")
    env = os.environ | {"X07_VM_CACHE_DIR": str(tmp_path / "cache"), "X07_VM_STATE_DIR": str(tmp_path / "jobs")}
    words = [sys.executable, "-m", "bench", "--short", "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    found = json.loads((tmp_path / "figures.json").read_bytes())
    assert (done.returncode, found["errors"]) == (0, {}), done.stderr
    ways = ("cold", "built", "cached", "from the pool")
    expected = {f"x07 {name}, {way}" for name in ("C", "Python") for way in ways} | {"library C, warm"}
    expected |= {
        "QEMU, started and stopped",
        "clone, until it answers",
        "hot clone that runs C",
        "next command in a VM, C",
        "sandbox, opened from the pool",
        "sandbox, 10 commands",
        "sandbox exec true, first",
        "sandbox exec true, 8 at once",
        "x07 sandbox exec true",
        "1 MiB in, write",
        "1 MiB out, tar",
        "bwrap, C",
        "bare exec, C",
    }
    assert expected <= found["times_s"].keys()
    assert all(len(times) == 1 for times in found["times_s"].values())
    assert len(found["rows"]) == 10
