#!/usr/bin/env python3
"""Write the generated tables of docs/reference/x07.md: flags, backends, variables.

python -m scripts.make_x07_page        in an environment that has x07-sandbox
"""

from __future__ import annotations

from pathlib import Path

from scripts.pages import filled
from x07_sandbox.backends.registry import BY_NAME
from x07_sandbox.cli import os_runner_options
from x07_sandbox.host.variables import VARIABLES, Variable

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "x07.md"


def backends_table() -> str:
    """Return the table of backends."""
    lines = ["| backend | `--sandbox-backend` | isolation | Linux | macOS | needs acceptance | here |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in BY_NAME.values():
        macos = f"{row.macos_from}+" if row.macos_from else ""
        isolation = " or ".join(f"`{one}`" for one in row.isolation)
        linux, weaker, here = "yes" * row.linux, "yes" * row.weaker, "yes" if row.built else "later"
        cells = (f"`{row.name}`", row.sandbox_class, isolation, linux, macos, weaker, here)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def variables_table() -> str:
    """Return the table of environment variables."""
    rows = ["| variable | value | while unset | effect | meaning |", "|---|---|---|---|---|"]
    rows += [
        f"| `{variable.name}` | {_values(variable)} | {variable.default} | {variable.effect} | {variable.doc} |"
        for variable in VARIABLES.values()
    ]
    return "\n".join(rows) + "\n"


def _values(variable: Variable) -> str:
    """Return the valid values of a variable."""
    if variable.kind == "choice":
        return ", ".join(
            f"`{word}`" if word == means else f"`{word}` (= `{means}`)"
            for word, means in (variable.choices or {}).items()
        )
    return {
        "flag": "`1 true TRUE yes YES`, `0 false FALSE no NO`",
        "number": f"{variable.lo} to {variable.hi}",
        "folder": "an absolute path",
        "digest": "`sha256:` and 64 hex digits",
    }.get(variable.kind, "text")


TABLES = {
    "flags": os_runner_options.describe,
    "backends": backends_table,
    "variables": variables_table,
}


def render() -> str:
    """Return the page with current tables."""
    return filled(PAGE, TABLES)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
