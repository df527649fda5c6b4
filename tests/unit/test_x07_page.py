"""docs/reference/x07.md matches the source, and its commands are tested."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from scripts.make_pages import DOCS
from x07_sandbox.cli.os_runner import OPTIONS
from x07_sandbox.policy.decode import decode_policy
from x07_sandbox.x07 import runner_report

ROOT = Path(__file__).resolve().parents[2]
TEXT = (DOCS / "reference/x07.md").read_text(encoding="utf-8")


def test_its_tables_are_those_of_the_source() -> None:
    """The page lists every flag and backend."""
    assert all(f"`{option.flag}" in TEXT for option in OPTIONS if not option.hidden)


def test_it_names_the_versions_and_codes_that_are_made() -> None:
    """The page names every version and error code of the reports."""
    made = (runner_report.SCHEMA, runner_report.WRAPPED_SCHEMA, runner_report.ATTESTATION_SCHEMA)
    assert all(
        name in TEXT for name in (*made, runner_report.POLICY_CODE, runner_report.GUEST_CODE, runner_report.WRITE_CODE)
    )


def test_every_command_of_the_page_is_run_by_a_test() -> None:
    """Every command on the page is run by a test."""
    (block,) = re.findall(r"(?ms)^```sh\n(.*?)^```$", TEXT)
    lines = [" ".join(line.split()) for line in block.replace("\\\n", " ").splitlines()]
    tree = ast.parse((ROOT / "tests" / "vm" / "test_x07_page.py").read_bytes())
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert len(lines) == 3
    assert set(lines) <= strings


def test_the_example_policy_is_valid() -> None:
    """examples/policy.json is a valid policy."""
    data = (ROOT / "examples" / "policy.json").read_bytes()
    assert decode_policy(data, source="examples/policy.json").policy_id == "example.strict"
