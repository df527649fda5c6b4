#!/usr/bin/env python3
"""Write docs/specification.md: every promise of the project with the test that proves it.

A promise is the docstring of a test. The script parses the tests and does not import them, so any Python can run it:

    python3 scripts/make_specification.py           write the file
    python3 scripts/make_specification.py --check   exit with 1 if it is stale
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "specification.md"

HEAD = """\
# Specification

The promises of x07-sandbox, one per line, each with the test that proves it. `scripts/make_specification.py` generates
this page from the tests' docstrings: to change a line, change its test.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """One test: its file (relative to the project, with slashes), its name, and its docstring on one line."""

    file: str
    test: str
    text: str


def promises(root: Path = ROOT) -> Iterator[Promise]:
    """Yield all tests in *root*/tests, by file and position. The text of a test without a docstring is empty."""
    for path in sorted((root / "tests").rglob("test_*.py")):
        file = path.relative_to(root).as_posix()
        for test, function in _tests(ast.parse(path.read_bytes(), filename=file)):
            yield Promise(file=file, test=test, text=" ".join((ast.get_docstring(function) or "").split()))


def _tests(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield the tests of one module, including those in classes, with pytest's names."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            inside = [(f"{node.name}::", child) for child in node.body]
        else:
            inside = [("", node)]
        for prefix, child in inside:
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and child.name.startswith("test_"):
                yield prefix + child.name, child


def render(root: Path = ROOT) -> str:
    """Return the text of docs/specification.md."""
    lines = [HEAD]
    file = ""
    for number, promise in enumerate(promises(root), start=1):
        if promise.file != file:
            file = promise.file
            title = ast.get_docstring(ast.parse((root / file).read_bytes())) or ""
            summary = title.partition("\n\n")[0].replace("\n", " ")
            lines.append(f"\n## {file}\n\n{summary}\n" if summary else f"\n## {file}\n")
        lines.append(f"{number}. {promise.text} (`{promise.test}`)")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    """Write the file or compare it; return the exit code."""
    text = render()
    if argv == ["--check"]:
        current = TARGET.is_file() and TARGET.read_text(encoding="utf-8") == text
        print("docs/specification.md is up to date." if current else "docs/specification.md is stale: run this script.")
        return 0 if current else 1
    if argv:
        print(__doc__, file=sys.stderr)
        return 2
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
