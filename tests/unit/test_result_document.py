"""The JSON document of a result."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jsonschema
import pytest

from tests.published import document, published
from x07_sandbox.errors import SandboxError
from x07_sandbox.library.run import run_program
from x07_sandbox.policy.outcomes import OUTCOMES
from x07_sandbox.reports.result import render_result
from x07_sandbox.sessions.result import Result

if TYPE_CHECKING:
    from pathlib import Path


def test_a_usage_error_is_a_result_that_keeps_to_the_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A usage error is a result that matches the schema."""
    monkeypatch.setenv("X07_VM_STATE_DIR", str(tmp_path / "jobs"))
    with pytest.raises(SandboxError) as caught:
        run_program(tmp_path / "missing.py")
    found = document(render_result(caught.value.result, full=True))
    assert found["outcome"] == "usage-error"
    assert found["x07_exit_code"] == 2
    schema = published()[found["schema_version"]]
    for outcome in OUTCOMES:
        jsonschema.validate(found | {"outcome": outcome, "isolation": "vm-emulated"}, schema)
    for word in ({"outcome": "well"}, {"isolation": "vm"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(found | word, schema)


def test_the_docstring_describes_every_field() -> None:
    """help(Result) describes every field."""
    documented = {word.strip(":.,") for word in (Result.__doc__ or "").split()}
    assert [name for name in Result.__struct_fields__ if name not in documented] == []
