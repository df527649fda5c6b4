#!/usr/bin/env python3
"""Writes the tables of docs/x07.md that come from the source: flags, backends, variables.

python scripts/make_x07_page.py        in an environment that has x07-sandbox
"""

from __future__ import annotations

from pathlib import Path

from x07_sandbox.backends import selection
from x07_sandbox.cli import os_runner_options
from x07_sandbox.host import variables

PAGE = Path(__file__).resolve().parent.parent / "docs" / "x07.md"
TABLES = {
    "flags": os_runner_options.describe,
    "backends": selection.describe,
    "variables": variables.describe,
}


def render() -> str:
    """The page with its tables as the source has them now."""
    text = PAGE.read_text(encoding="utf-8")
    for name, describe in TABLES.items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, found, rest = text.partition(start)
        if not found or end not in rest:
            raise SystemExit(f"{PAGE.name} has no place for {name}")
        text = f"{before}{start}{describe()}{rest[rest.index(end) :]}"
    return text


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
