#!/usr/bin/env python3
"""Writes the tables of docs/reference/outcomes.md from the table of outcomes.

python -m scripts.make_outcomes_page        in an environment that has x07-sandbox
"""

from __future__ import annotations

from pathlib import Path

from scripts.pages import filled
from x07_sandbox.plan.outcomes import describe, describe_exits_table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "outcomes.md"
TABLES = {"outcomes": describe, "exits": describe_exits_table}


def render() -> str:
    """The page with its tables as the source has them now."""
    return filled(PAGE, TABLES)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
