"""Generated pages are what the source says, and the reference is complete."""

from __future__ import annotations

import json

import pytest

from scripts.make_pages import DOCS, PAGES, field_meanings, render
from x07_sandbox.cli.parser import actions, parser_for
from x07_sandbox.host.variables import VARIABLES
from x07_sandbox.reports.schemas import schemas


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_what_the_source_says(page: str) -> None:
    """The generated parts of a page are up to date."""
    assert render(page) == (DOCS / page).read_text(encoding="utf-8"), "run: python -m scripts.make_pages"


def test_every_option_is_described() -> None:
    """The page of the command line has every option of every command, with a text."""
    text = (DOCS / "reference/command-line.md").read_text(encoding="utf-8")
    options = [action for action in actions(parser_for([])) if action.option_strings]
    assert [action.option_strings for action in options if not action.help] == []
    assert [action.option_strings for action in options if action.option_strings[0] not in text] == []


def test_every_variable_is_described() -> None:
    """The page of the settings has every environment variable."""
    text = (DOCS / "reference/settings.md").read_text(encoding="utf-8")
    assert [name for name in VARIABLES if f"`{name}`" not in text] == []


def test_every_field_of_a_result_is_described() -> None:
    """Every field of every object in a result has a meaning, in help(Result), the schema and the page."""
    objects = json.loads(schemas()["result.schema.json"])["$defs"]
    assert {
        name: missing
        for name, schema in objects.items()
        if (missing := sorted(schema["properties"].keys() - field_meanings(schema).keys()))
    } == {}
