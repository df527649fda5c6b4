#!/usr/bin/env python3
"""Writes the tables of docs/outcomes.md from the table of outcomes.

python scripts/make_outcomes_page.py        in an environment that has x07-sandbox
"""

from __future__ import annotations

from pathlib import Path

from x07_sandbox.plan.outcomes import describe, describe_exits_table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "outcomes.md"
TABLES = {"outcomes": describe, "exits": describe_exits_table}


def render() -> str:
    """The page with its tables as the source has them now."""
    text = PAGE.read_text(encoding="utf-8")
    for name, made in TABLES.items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, found, rest = text.partition(start)
        if not found or end not in rest:
            raise SystemExit(f"{PAGE.name} has no place for {name}")
        text = f"{before}{start}{made()}{rest[rest.index(end) :]}"
    return text


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
