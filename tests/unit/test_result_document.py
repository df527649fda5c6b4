"""The published schema of the result, and what keeps to it."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from x07_sandbox.errors import SandboxError
from x07_sandbox.reports.document import render_json, result_schema
from x07_sandbox.runs.library import run_program

ROOT = Path(__file__).resolve().parents[2]


def test_the_published_schema_is_that_of_the_types() -> None:
    """schemas/result.schema.json is generated from the result's types."""
    assert (ROOT / "schemas/result.schema.json").read_text(encoding="utf-8") == result_schema()


def test_a_usage_error_is_a_result_that_keeps_to_the_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that is not there ends as usage-error, as one JSON object after the schema."""
    monkeypatch.setenv("X07_VM_STATE_DIR", str(tmp_path / "jobs"))
    with pytest.raises(SandboxError) as caught:
        run_program(tmp_path / "missing.py")
    document = json.loads(render_json(caught.value.result))
    jsonschema.validate(document, json.loads(result_schema()))
    assert document["outcome"] == "usage-error"
    assert document["x07_exit_code"] == 2
