"""docs/reference/outcomes.md and the help match the table of outcomes."""

from __future__ import annotations

import subprocess

from scripts.make_pages import DOCS
from tests.command import X07
from x07_sandbox.policy.outcomes import OUTCOMES, ExitRule, outcomes_by_exit

HELP = [*X07, "run", "--help-all"]


def test_its_tables_are_those_of_the_source() -> None:
    """docs/reference/outcomes.md lists every outcome with its exit code and meaning."""
    text = (DOCS / "reference/outcomes.md").read_text(encoding="utf-8")
    assert all(f"| `{outcome}` | {row.exit} | `{row.fault}` | {row.doc} |" in text for outcome, row in OUTCOMES.items())


def test_each_outcome_has_one_exit_code() -> None:
    """Each outcome has exactly one exit code."""
    found = [outcome for outcomes in outcomes_by_exit().values() for outcome in outcomes]
    assert sorted(found) == sorted(OUTCOMES)
    assert set(outcomes_by_exit()) >= set(ExitRule)


def test_the_help_of_a_run_has_the_same_exit_codes() -> None:
    """`x07 run --help-all` lists every exit code with its outcomes."""
    shown = subprocess.run(HELP, capture_output=True, text=True, check=True).stdout
    for code, outcomes in outcomes_by_exit().items():
        assert f"\n  {code}: {', '.join(outcomes)}\n" in shown
