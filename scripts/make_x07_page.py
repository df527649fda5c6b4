#!/usr/bin/env python3
"""Write the generated tables of docs/reference/x07.md: flags, backends.

python -m scripts.make_x07_page        in an environment that has x07-sandbox
"""

from __future__ import annotations

from pathlib import Path

from scripts.pages import filled
from x07_sandbox.backends.registry import BY_NAME
from x07_sandbox.cli import os_runner

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "x07.md"


def backends_table() -> str:
    """Return the table of backends."""
    lines = ["| backend | `--sandbox-backend` | isolation | Linux | macOS | needs acceptance |"]
    lines.append("|---|---|---|---|---|---|")
    for row in BY_NAME.values():
        macos = f"{row.macos_from}+" if row.macos_from else ""
        isolation = " or ".join(f"`{one}`" for one in row.isolation)
        linux, weaker = "yes" * row.linux, "yes" * row.weaker
        cells = (f"`{row.name}`", row.sandbox_class, isolation, linux, macos, weaker)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


TABLES = {
    "flags": os_runner.describe,
    "backends": backends_table,
}


def render() -> str:
    """Return the page with current tables."""
    return filled(PAGE, TABLES)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
