"""The checks of examples/agent_tool.py, without a sandbox."""

from __future__ import annotations

import ast
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from tests.examples import EXAMPLES, load

WORDS = st.sampled_from(["command", "timeout_s", "path", "content", "offset", "port", "id", "name", "input", "fetch"])
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from([0, 1, 60, 61, 7999, 8000, 8099, 8100, 1 << 40]), WORDS,
    st.floats(allow_nan=False).filter(lambda number: not number.is_integer()), st.text(), st.just("/x"), st.just(""),
    st.lists(st.integers(), max_size=2), st.dictionaries(WORDS, st.integers(), max_size=2),
)  # fmt: skip


TOOL = load("agent_tool")
SCHEMAS = [TOOL.ID, TOOL.ENVELOPE, *TOOL.INPUTS.values()]


@pytest.mark.parametrize("name", ["agent_tool", "grader"])
def test_the_examples_run_with_what_the_quick_start_installs(name: str) -> None:
    """The examples of tools and of a grader import nothing but x07-sandbox and Python's own library."""
    tree = ast.parse((EXAMPLES / f"{name}.py").read_bytes())
    found = {one.module for one in ast.walk(tree) if isinstance(one, ast.ImportFrom)}
    found |= {alias.name for one in ast.walk(tree) if isinstance(one, ast.Import) for alias in one.names}
    assert {str(module).partition(".")[0] for module in found} <= {*sys.stdlib_module_names, "x07_sandbox"}


@given(st.sampled_from(SCHEMAS), st.one_of(VALUES, st.dictionaries(WORDS, VALUES, max_size=4)))
def test_the_checks_of_calls_are_those_of_json_schema(schema: dict[str, Any], value: object) -> None:
    """The example accepts a call if and only if a validator of JSON Schema accepts it."""
    assert (not [*TOOL.violations(schema, value, "$")]) == Draft202012Validator(schema).is_valid(value)
