#!/usr/bin/env python3
"""Write the generated tables of docs/reference/x07.md: flags, backends.

python -m scripts.make_x07_page        in an environment that has x07-sandbox
"""

from __future__ import annotations

from pathlib import Path

from scripts.pages import filled
from x07_sandbox.backends import selection
from x07_sandbox.cli import os_runner_options

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "x07.md"
TABLES = {
    "flags": os_runner_options.describe,
    "backends": selection.describe,
}


def render() -> str:
    """Return the page with current tables."""
    return filled(PAGE, TABLES)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
