#!/usr/bin/env python3
"""Write the generated parts of docs/reference/command-line.md, library.md, settings.md and result.md.

python -m scripts.make_reference_pages        in an environment that has x07-sandbox
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from scripts.pages import filled
from x07_sandbox.cli.parser import Parser, parser_for
from x07_sandbox.host import user_settings
from x07_sandbox.host.variables import VARIABLES, Variable
from x07_sandbox.options import BY_KEYWORD
from x07_sandbox.policy.outcomes import OUTCOMES
from x07_sandbox.reports.schemas import schemas

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

FOLDER: Final = Path(__file__).resolve().parent.parent / "docs" / "reference"
_DESCRIBED_ONCE: Final = frozenset({"-h", "--version", "--report-out", "--quiet-json"})  # above the commands
_COLUMNS: Final = 80
_MEANING_AT: Final = 48  # the last column at which a meaning begins beside its name
_ITEM: Final = re.compile(r"( +)(.*?)(?:(  +)(\S.*))?")
_BREAK: Final = re.compile(r" (?=--|[|>] )")
_PAGE: Final = re.compile(r"\(docs/([\w/-]+\.md)\)")
_FIELD: Final = re.compile(r"(\w+(?:, \w+)*): (.*)")


def commands() -> str:
    """Return a section for each command."""
    inner = _inner(parser_for([]))
    return "".join(text for name, parser in inner.items() for text in _sections(parser, f"x07 {name}"))


def _inner(parser: argparse.ArgumentParser) -> dict[str, Parser]:
    """Return the parsers of a command's actions, by name."""
    found = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))  # noqa: SLF001 - argparse has no other way
    return {name: inner for action in found for name, inner in cast("dict[str, Parser]", action.choices).items()}


def _sections(parser: Parser, command: str) -> Iterator[str]:
    """Yield the section of a command, and those of its actions."""
    inner = _inner(parser)
    yield f"{'#' * (command.count(' ') + 1)} {command}\n\n"
    if parser.description:
        yield f"{parser.description.strip()}\n\n"
    for title, rows in [] if inner else _groups(parser).items():
        yield f"{title}{_table('argument | meaning', rows)}\n"
    below = parser.epilog if parser.late_epilog is None else parser.late_epilog("")
    if below:
        yield f"```text\n{_narrow(below.strip())}\n```\n\n"
    for name, one in inner.items():
        yield from _sections(one, f"{command} {name}")


def _narrow(text: str) -> str:
    """Return help in lines of at most 80 columns, so that the page does not scroll. A terminal shows up to 110."""
    found: list[str] = []
    for kind, lines in itertools.groupby(text.splitlines(), lambda line: line[:1].isspace() if line else None):
        for part in lines if kind is not False else re.split(r"\n(?=exit code:)", "\n".join(lines)):
            if max(map(len, part.split("\n"))) <= _COLUMNS:
                found.append(part)
            else:
                found += _narrow_line(part) if kind else _wrapped(part)
    return "\n".join(found)


def _narrow_line(line: str) -> list[str]:
    """Return an indented line, which is words, a name with its meaning, or a command with or without its meaning."""
    lead, name, gap, meaning = cast("re.Match[str]", _ITEM.fullmatch(line)).groups()
    if meaning:
        column = len(lead + name + gap)
        if column <= _MEANING_AT:
            return _wrapped(meaning, f"{lead}{name}{gap}", " " * column)
        return [lead + name, *_wrapped(meaning, f"{lead}    ", f"{lead}    ")]
    if not name.startswith("x07 "):
        return _wrapped(name, lead, lead)
    ends = [match.start() for match in _BREAK.finditer(name) if name.count("'", 0, match.start()) % 2 == 0]
    end = max(end for end in ends if end < _COLUMNS - len(lead) - 1)
    return [f"{lead}{name[:end]} \\", f"{lead}    {name[end + 1 :]}"]


def _wrapped(text: str, first: str = "", others: str = "") -> list[str]:
    return textwrap.wrap(
        text, _COLUMNS, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )


def _groups(parser: Parser) -> dict[str, list[str]]:
    """Return the rows of each group of arguments, by title. Arguments and general options have an empty title."""
    found: dict[str, list[str]] = {}
    for group in parser._action_groups:  # noqa: SLF001 - as above
        name = group.title or ""
        title = "" if name in {"positional arguments", "options"} else f"{name[:1].upper()}{name[1:]}:\n\n"
        for action in group._group_actions:  # noqa: SLF001 - as above
            if _DESCRIBED_ONCE.isdisjoint(action.option_strings):
                found.setdefault(title, []).append(_row(action))
    return found


def _row(action: argparse.Action) -> str:
    choices = "{" + ",".join(map(str, action.choices or ())) + "}"
    value = action.metavar or (choices if action.choices else action.dest.upper())
    words = [", ".join(action.option_strings), str(value) if action.nargs != 0 else ""]
    again = " (repeatable)" if isinstance(action, argparse._AppendAction) else ""  # noqa: SLF001 - as above
    return f"`{_cell(' '.join(filter(None, words)))}` | {_cell(action.help or '')}{again}"


def keywords() -> str:
    """Return the table of the keywords of `run_program`."""
    rows = []
    for keyword, row in BY_KEYWORD.items():
        field = row.sets if row.sets.startswith("limits.") and not row.field else row.field
        names = (f"`{name}`" if name else "" for name in (keyword, row.flag, row.manifest, field))
        rows.append(" | ".join([*names, _cell(row.help)]))
    return _table("keyword | flag of `x07 run` | key of a manifest | field of the policy | meaning", rows)


def variables() -> str:
    """Return the table of environment variables."""
    rows = (
        f"`{variable.name}` | {variable.doc} | {_values(variable)} | {variable.default} | {variable.effect}"
        for variable in VARIABLES.values()
    )
    return _table("variable | meaning | value | default | has an effect", rows)


def _values(variable: Variable) -> str:
    """Return the valid values of a variable."""
    if variable.kind == "choice":
        return ", ".join(
            f"`{word}`" if word == means else f"`{word}` (= `{means}`)"
            for word, means in (variable.choices or {}).items()
        )
    return {
        "flag": "`1`, `true` or `yes`; `0`, `false` or `no` (all in lower or all in upper case)",
        "number": f"{variable.lo} to {variable.hi}",
        "folder": "an absolute path",
        "digest": "`sha256:` and 64 hex digits",
    }.get(variable.kind, "text")


def settings() -> str:
    """Return the keys of the settings file."""
    rows = (f"`[{row[0]}]` | `{row[1]}` | {' | '.join(row[2:])}" for row in user_settings.SETTINGS)
    return _table("table | key | values | default | meaning", rows)


def fields() -> str:
    """Return a section for each object of the result."""
    objects = json.loads(schemas()["result.schema.json"])["$defs"]
    return "\n".join(_object(name, schema) for name, schema in objects.items())


def _object(name: str, schema: dict[str, Any]) -> str:
    meaning = field_meanings(schema)
    rows = (f"`{field}` | {_type(inner)} | {_cell(meaning[field])}" for field, inner in schema["properties"].items())
    return f"## {name}\n\n{schema['description'].splitlines()[0]}\n\n{_table('field | type | meaning', rows)}"


def field_meanings(schema: dict[str, Any]) -> dict[str, str]:
    """Return the meaning of each field, from its own description or a line `name, name: meaning` of the object's."""
    found = {name: inner["description"] for name, inner in schema["properties"].items() if "description" in inner}
    names: list[str] = []
    for line in schema["description"].splitlines()[1:]:
        if (match := _FIELD.match(line)) is not None:
            names = match[1].split(", ")
            found |= dict.fromkeys(names, match[2])
        elif line:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def _type(schema: dict[str, Any]) -> str:
    """Return the type of a field in words."""
    if "anyOf" in schema:
        return " or ".join(map(_type, schema["anyOf"]))
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if words := schema.get("enum"):
        return "[outcome](outcomes.md)" if {*words} == {*OUTCOMES} else ", ".join(f"`{word}`" for word in words)
    kind: str = schema.get("type", "any")
    if kind == "array":
        return f"list of {_type(schema['items'])}"
    if kind == "object":
        return f"object of {_type(schema['additionalProperties'])}"
    return {"integer": "whole number", "string": "text", "boolean": "true or false"}.get(kind, kind)


def _cell(text: str) -> str:
    return _PAGE.sub(_link, text.replace("|", "\\|"))


def _link(found: re.Match[str]) -> str:
    """Return the link to a page that a docstring names by its path in the repository."""
    page = FOLDER.parent / found[1]
    title = page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
    return f"([{title}]({os.path.relpath(page, FOLDER)}))"


def _table(head: str, rows: Iterable[str]) -> str:
    lines = [f"| {head} |", "|" + "---|" * len(head.split(" | ")), *(f"| {row} |" for row in rows)]
    return "\n".join(lines) + "\n"


PARTS = {
    "command-line.md": {"commands": commands},
    "library.md": {"keywords": keywords},
    "settings.md": {"variables": variables, "settings": settings},
    "result.md": {"fields": fields},
}


def render(name: str) -> str:
    """Return a page with current parts."""
    return filled(FOLDER / name, PARTS[name])


if __name__ == "__main__":
    for page in PARTS:
        (FOLDER / page).write_text(render(page), encoding="utf-8")
