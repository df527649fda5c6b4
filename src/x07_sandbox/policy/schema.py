"""The files that the model makes: schemas/run-os-policy.schema.json and docs/policy.md.

A unit test holds the files to this. ``python -m x07_sandbox.policy.schema schema|docs`` prints either.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec

from x07_sandbox.policy.default import default_policy, render_policy
from x07_sandbox.policy.model import (
    ABSENT_DB,
    ABSENT_DB_NET,
    ABSENT_LANGUAGE,
    ABSENT_SQLITE,
    ABSENT_THREADS,
    SCHEMA_VERSION,
    Policy,
    Section,
)
from x07_sandbox.policy.rules import RULES

_REF = "#/$defs/"
# Absence is a value here; see the ABSENT_* sections of the model.
_OPTIONAL_SECTIONS = {
    "db": ABSENT_DB,
    "db.sqlite": ABSENT_SQLITE,
    "db.net": ABSENT_DB_NET,
    "language": ABSENT_LANGUAGE,
    "threads": ABSENT_THREADS,
}
_TABLE_HEAD = ("| Field | Values | When absent | Meaning |", "|---|---|---|---|")
_KINDS = {"boolean": "true or false", "integer": "whole number", "string": "text", "array": "list"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One field of the document, for people and for tests."""

    path: str
    section: str  # its definition's name in the schema
    kind: str
    bounds: str
    required: bool  # inside its section
    default: object
    doc: str


@cache
def policy_schema() -> dict[str, Any]:
    """The document's JSON Schema (draft 2020-12), closed at every level; not to be changed by the caller."""
    made = msgspec.json.schema(Policy)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": SCHEMA_VERSION,
        **made,
    }


def fields() -> tuple[Field, ...]:
    """Every field of the document in the model's order; a list is one field."""
    return tuple(_fields("Policy", ""))


def _fields(section: str, prefix: str) -> Iterator[Field]:
    made = policy_schema()["$defs"][section]
    for name, schema in made["properties"].items():
        if target := schema.get("$ref"):
            yield from _fields(target.removeprefix(_REF), f"{prefix}{name}.")
            continue
        yield Field(
            path=f"{prefix}{name}",
            section=section,
            kind=_KINDS[schema.get("type", "string")],
            bounds=_bounds(schema),
            required=name in made.get("required", ()),
            default=schema.get("default"),
            doc=schema["description"],
        )


def _bounds(schema: Mapping[str, Any]) -> str:
    """The range of a value in words; empty when there is none to say."""
    if "enum" in schema:
        return ", ".join(f"`{choice}`" for choice in schema["enum"])
    if "maximum" in schema:
        return f"{schema['minimum']} to {schema['maximum']}"
    if "maxItems" in schema:
        items = schema["items"]
        inner = f" of {_bounds(items)}" if "$ref" not in items else ""
        return f"at most {schema['maxItems']}{inner}"
    if "maxLength" in schema:
        return f"{schema.get('minLength', 0)} to {schema['maxLength']} characters"
    return f"`{schema['pattern']}`" if "pattern" in schema else ""


def render_schema() -> bytes:
    """The bytes of schemas/run-os-policy.schema.json."""
    return (json.dumps(policy_schema(), indent=2, ensure_ascii=False) + "\n").encode()


def render_docs() -> str:
    """The text of docs/policy.md."""
    lines = [
        "# The policy document",
        "",
        "<!-- Made by `python -m x07_sandbox.policy.schema docs` from src/x07_sandbox/policy; do not edit. -->",
        "",
        f"A policy is one JSON object of format `{SCHEMA_VERSION}`: UTF-8, at most 1 MiB. It is refused as a whole,",
        "before anything starts, if it holds a field that is not listed here, a key twice, a value out of range, or",
        "breaks one of the rules at the end; the message names every problem with its place. The same as a JSON",
        "Schema: [schemas/run-os-policy.schema.json](../schemas/run-os-policy.schema.json).",
        "",
        "What is enforced, by whom, and what is only advice to X07's own libraries, stands in the result of each run",
        "(`controls`), one line for every field.",
        "",
        "All sections are required but these, which count like this when they are absent:",
        "",
        *(f"- `{name}`: {_in_words(section)}" for name, section in _OPTIONAL_SECTIONS.items()),
        "",
    ]
    for section, inner in _by_section():
        doc = policy_schema()["$defs"][inner[0].section]["description"]
        lines += [f"## {section}", "", doc, "", *_TABLE_HEAD]
        lines += [_row(field) for field in inner]
        lines.append("")
    lines += ["## Each host of net.allow_hosts", "", *_TABLE_HEAD]
    lines += [_row(field) for field in _fields("HostPorts", "")]
    lines += ["", "## Rules", "", "These hold whether or not their section is enabled.", ""]
    lines += [f"{number}. {rule.doc}" for number, rule in enumerate(RULES, start=1)]
    lines += ["", "## The default policy", "", "This one applies when none is given.", "", "```json"]
    lines += [render_policy(default_policy()).decode().rstrip("\n"), "```", ""]
    return "\n".join(lines)


def _by_section() -> Iterator[tuple[str, list[Field]]]:
    grouped: dict[str, list[Field]] = {}
    for field in fields():
        grouped.setdefault(field.path.rpartition(".")[0] or "Top level", []).append(field)
    yield from grouped.items()


def _in_words(section: Section) -> str:
    plain = msgspec.to_builtins(section)
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in plain.items() if not isinstance(value, dict))


def _row(field: Field) -> str:
    values = f"{field.kind}, {field.bounds}" if field.bounds else field.kind
    absent = "" if field.default is None else f"`{json.dumps(field.default)}`"
    if field.required:
        absent = "required"
    return f"| `{field.path}` | {values.replace('|', chr(92) + '|')} | {absent} | {field.doc} |"


if __name__ == "__main__":
    sys.stdout.write({"schema": render_schema().decode, "docs": render_docs}[sys.argv[1]]())
