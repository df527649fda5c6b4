#!/usr/bin/env python3
"""Write the tables of docs/reference/outcomes.md from policy/outcomes.

python -m scripts.make_outcomes_page        in an environment that has x07-sandbox
"""

from __future__ import annotations

from pathlib import Path

from scripts.pages import filled
from x07_sandbox.policy.outcomes import OUTCOMES, outcomes_by_exit

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "outcomes.md"


def outcomes_table() -> str:
    """Return the table of outcomes."""
    rows = ["| outcome | exit code of `x07 run` | default `fault` | what happened |", "|---|---|---|---|"]
    rows += [f"| `{outcome}` | {row.exit} | `{row.fault}` | {row.doc} |" for outcome, row in OUTCOMES.items()]
    return "\n".join(rows) + "\n"


def exits_table() -> str:
    """Return the table of exit codes."""
    rows = ["| exit code | outcomes |", "|---|---|"]
    rows += [f"| {code} | {', '.join(f'`{name}`' for name in names)} |" for code, names in outcomes_by_exit().items()]
    return "\n".join(rows) + "\n"


def render() -> str:
    """Return the page with current tables."""
    return filled(PAGE, {"outcomes": outcomes_table, "exits": exits_table})


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
