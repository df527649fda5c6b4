#!/usr/bin/env python3
"""Write the tables of docs/reference/outcomes.md from plan/outcomes.

python -m scripts.make_outcomes_page        in an environment that has x07-sandbox
"""

from __future__ import annotations

from pathlib import Path

from scripts.pages import filled
from x07_sandbox.plan.outcomes import describe, describe_exits_table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "outcomes.md"
TABLES = {"outcomes": describe, "exits": describe_exits_table}


def render() -> str:
    """Return the page with current tables."""
    return filled(PAGE, TABLES)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
