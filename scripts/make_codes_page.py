#!/usr/bin/env python3
"""Write the tables of reasons and kinds of hints in docs/reference/codes.md.

python -m scripts.make_codes_page        in an environment that has x07-sandbox
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args, get_type_hints

from scripts.pages import filled
from x07_sandbox.policy.denials import Hint
from x07_sandbox.policy.outcomes import REASONS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "codes.md"


def reasons() -> str:
    """Return the table of reasons."""
    rows = ["| code | sentence |", "|---|---|", *(f"| `{code}` | {text} |" for code, text in REASONS.items())]
    return "\n".join(rows) + "\n"


def hints() -> str:
    """Return the kinds of hints, as one line."""
    return ", ".join(f"`{kind}`" for kind in get_args(get_type_hints(Hint)["kind"])) + "\n"


def render() -> str:
    """Return the page with current tables."""
    return filled(PAGE, {"reasons": reasons, "hints": hints})


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
