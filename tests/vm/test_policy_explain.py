"""`x07 policy explain` agrees with the result of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.command import x07
from tests.conftest import sample

if TYPE_CHECKING:
    from x07_sandbox.images.store import Image

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = str(ROOT / "examples/jsonl_to_csv.py")

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("state")]


def _json(where: Path, *words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(x07(where, *words).out)
    return found


@pytest.mark.parametrize("template", sample(["default", "worker", "postgres-client", "cli"], 2))
def test_explained_controls_match_the_run(tmp_path: Path, image: Image, template: str) -> None:
    """A run has the controls that `x07 policy explain` showed, and refuses what it showed as refused."""
    assert image.digest
    folder = tmp_path / "project"  # beside the state folder, which is not copied then
    folder.mkdir()
    _json(folder, "policy", "init", "--json", "--template", template, "--out", "policy.json")
    explained = _json(folder, "policy", "explain", "policy.json", "--json")
    result = _json(folder, "run", "--json=full", "--policy", "policy.json", PROGRAM)
    for row in explained["controls"]:
        del row["value"], row["in_sandbox"]
    assert result["controls"] == explained["controls"]
    assert result["isolation"] in explained["isolation"]
    assert result["backend"] == explained["backend"]
    assert (result["outcome"] == "refused") == (not explained["carried_out"])
    assert [denial["field"] for denial in result["denials"]] == [refusal["field"] for refusal in explained["refusals"]]
