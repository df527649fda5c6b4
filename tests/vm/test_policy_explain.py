"""What was explained before a run is what the run's result says of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from x07_sandbox.images.store import Image

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = str(ROOT / "examples/jsonl_to_csv.py")

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("state")]


def _json(where: Path, *words: str) -> dict[str, Any]:
    argv = [sys.executable, "-m", "x07_sandbox.cli.main", *words]
    done = subprocess.run(argv, cwd=where, stdin=subprocess.DEVNULL, capture_output=True, check=False, env=os.environ)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("template", ["default", "worker", "cli", "postgres-client"])
def test_what_is_explained_is_what_runs(tmp_path: Path, image: Image, template: str) -> None:
    """The controls of a result are those that `x07 policy explain` told, and what it refuses is refused."""
    assert image.digest
    _json(tmp_path, "policy", "init", "--json", "--template", template, "--out", "policy.json")
    told = _json(tmp_path, "policy", "explain", "policy.json", "--json")
    result = _json(tmp_path, "run", "--json=full", "--policy", "policy.json", PROGRAM)
    for row in told["controls"]:
        del row["value"]
    assert result["controls"] == told["controls"]
    assert result["isolation"] in told["isolation"]
    assert result["backend"] == told["backend"]
    assert (result["outcome"] == "refused") == (not told["carried_out"])
    assert [denial["field"] for denial in result["denials"]] == [refusal["field"] for refusal in told["refusals"]]
