"""The examples that need no framework."""

from __future__ import annotations

import ast
import sys

import pytest

from tests.examples import EXAMPLES


@pytest.mark.parametrize("name", ["agent_tool", "grader"])
def test_the_examples_run_with_what_the_quick_start_installs(name: str) -> None:
    """The examples of tools and of a grader import nothing but x07-sandbox and Python's own library."""
    tree = ast.parse((EXAMPLES / f"{name}.py").read_bytes())
    found = {one.module for one in ast.walk(tree) if isinstance(one, ast.ImportFrom)}
    found |= {alias.name for one in ast.walk(tree) if isinstance(one, ast.Import) for alias in one.names}
    assert {str(module).partition(".")[0] for module in found} <= {*sys.stdlib_module_names, "x07_sandbox"}
