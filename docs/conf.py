"""Sphinx: the documentation as a site. `scripts/build_docs.sh` builds it.

Warnings are errors.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from pygments.lexers.special import TextLexer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sphinx.application import Sphinx

project = "x07-sandbox"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
autodoc_typehints = "none"  # the docstrings say what is taken
autodoc_class_signature = "separated"
smartquotes = False
html_theme = "furo"
html_title = "x07-sandbox"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["narrow.css"]
myst_heading_anchors = 4

# These lie outside the site: the text of the link stays, with the path in the
# repository.
_OUTSIDE: Final = re.compile(
    r"\[([^\]]+)\]\((?:\.\./)+(examples/README\.md|CONTRIBUTING\.md|\.github/[^)#]+)(?:#[^)]*)?\)"
)


def _name_what_lies_outside(
    _app: Sphinx, _page: str, source: list[str]
) -> None:
    source[0] = _OUTSIDE.sub(r"\1 (`\2`)", source[0])


# A page that a docstring names by its path in the repository.
_PAGE: Final = re.compile(r"\(docs/([\w/-]+)\.md\)")
_FIELD: Final = re.compile(r"(\w+(?:, \w+)*): ")


def _as_rst(lines: list[str]) -> Iterator[str]:
    """Our docstrings as reStructuredText.

    `name: meaning` is an item of a list, and an indented block an example.
    """
    before, example, listed = "", False, False
    for line in lines:
        indented = line.startswith(" ")
        if indented and not before and not example:
            example = True
            yield from ("::", "")
        example = example and (indented or not line)
        if not example and not indented and _FIELD.match(line):
            yield from ([] if listed or not before else [""])
            listed = True
            yield "- " + _FIELD.sub(r"**\1**: ", line, count=1)
        elif line and not example:
            yield f"  {line.strip()}" if listed else line
        else:
            listed = False
            yield line
        before = line


def _rewrite(
    _app: Sphinx,
    _what: str,
    _name: str,
    _object: object,
    _options: object,
    lines: list[str],
) -> None:
    lines[:] = [_PAGE.sub(r"(:doc:`/\1`)", line) for line in _as_rst(lines)]


def setup(app: Sphinx) -> None:
    """Called by Sphinx. Diagrams are shown as their text."""
    app.connect("autodoc-process-docstring", _rewrite)
    app.add_lexer("mermaid", TextLexer)
    app.add_lexer("diagram", TextLexer)  # text whose lines must not be wrapped
    app.connect("source-read", _name_what_lies_outside)
