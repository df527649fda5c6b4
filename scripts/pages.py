"""Generated parts of pages in docs/."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path


def filled(page: Path, parts: Mapping[str, Callable[[], str]]) -> str:
    """Return the page with the named parts replaced. Raises SystemExit if the page lacks the markers of a part."""
    text = page.read_text(encoding="utf-8")
    for name, made in parts.items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, found, rest = text.partition(start)
        if not found or end not in rest:
            raise SystemExit(f"{page.name} has no markers for {name}")
        text = f"{before}{start}{made()}{rest[rest.index(end) :]}"
    return text
