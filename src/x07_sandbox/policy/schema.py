"""The JSON Schema made from the model, and what is made from it: the fields, and descriptions of violations."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import msgspec

from x07_sandbox.host.documents import prepared
from x07_sandbox.policy.model import HUGE, MISSING, SCHEMA_VERSION, Policy, Problem, json_path

_REF = "#/$defs/"
_SHOWN_CHARS = 40
_KEY_CHARS = 64  # of a misspelt key: difflib is quadratic
_ELSEWHERE_CUTOFF = 0.9
_TYPES: dict[str, tuple[type, str]] = {
    "object": (dict, "an object"),
    "array": (list, "a list"),
    "string": (str, "a string"),
    "integer": (int, "an integer"),
    "boolean": (bool, "true or false"),
}
_ANY = (object, "any value")
_RANGE = "must be from {minimum} to {maximum}, not {shown}"
_LENGTH = "must have {minLength} to {maxLength} characters, not {length}"
# For each keyword of the schema: whether a value of the right type violates it, and the message.
_KEYWORDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "minimum": (lambda value, least: value < least, _RANGE),
    "maximum": (lambda value, most: value > most, _RANGE),
    "minLength": (lambda value, least: len(value) < least, _LENGTH),
    "maxLength": (lambda value, most: len(value) > most, _LENGTH),
    "maxItems": (lambda value, most: len(value) > most, "must have at most {maxItems} entries, not {length}"),
    "enum": (lambda value, choices: value not in choices, "must be {choices}, not {shown}"),
    "pattern": (lambda value, pattern: re.search(pattern, value) is None, "must match {pattern}, not {shown}"),
}


class Field(NamedTuple):
    """One field of the document. section: its definition's name in the schema. required: inside its section."""

    path: str
    section: str
    schema: Mapping[str, Any]
    required: bool


@cache
def policy_schema() -> dict[str, Any]:
    """Return the document's JSON Schema (draft 2020-12), which allows no unknown fields. Do not modify the result."""
    made = msgspec.json.schema(prepared(Policy))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": SCHEMA_VERSION, **made}


def fields(section: str = "Policy", prefix: str = "") -> Iterator[Field]:
    """Yield every field of a section and of the sections in it, in the model's order; a list is one field."""
    made = policy_schema()["$defs"][section]
    for name, schema in made["properties"].items():
        if target := schema.get("$ref"):
            yield from fields(target.removeprefix(_REF), f"{prefix}{name}.")
        else:
            yield Field(f"{prefix}{name}", section, schema, name in made.get("required", ()))


def largest(path: str) -> int:
    """Return the maximum of the field at *path*, such as "limits.fds"."""
    return range_of(path)[1]


def range_of(path: str) -> tuple[int, int]:
    """Return the minimum and the maximum of the field at *path*. The field must have both."""
    schema = next(field.schema for field in fields() if field.path == path)
    return schema["minimum"], schema["maximum"]


def render_schema() -> bytes:
    """Return the content of schemas/run-os-policy.schema.json."""
    return (json.dumps(policy_schema(), indent=2, ensure_ascii=False) + "\n").encode()


def schema_problems(document: object) -> Iterator[Problem]:
    """Yield one problem for each place in *document* (a json.loads value) that violates the schema."""
    yield from _problems(policy_schema(), (), document)


def _problems(schema: Mapping[str, Any], place: tuple[str | int, ...], value: Any) -> Iterator[Problem]:  # noqa: ANN401
    if "$ref" in schema:
        schema = policy_schema()["$defs"][schema["$ref"].rpartition("/")[2]]
    kind: Any
    kind, words = _TYPES.get(schema.get("type", ""), _ANY)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        yield Problem(json_path(place), f"must be {words}, not {_shown(value)}", _suggest_value(schema, value))
        return
    if kind is dict:
        properties = schema["properties"]
        for name in (name for name in properties if name in value):
            yield from _problems(properties[name], (*place, name), value[name])
        for name in (name for name in schema.get("required", ()) if name not in value):
            yield Problem(json_path((*place, name)), MISSING)
        missing = [name for name in properties if name not in value]
        for name in (name for name in value if name not in properties):
            yield Problem(json_path((*place, name)), "is not a field of the policy", _suggest(name, missing))
    elif kind is list:
        for index, entry in enumerate(value):
            yield from _problems(schema["items"], (*place, index), entry)
    if message := _violation(schema, value):
        yield Problem(json_path(place), message, _suggest_value(schema, value))


def _violation(schema: Mapping[str, Any], value: object) -> str:
    """Return how a value of the right type violates its schema, or "" if it does not."""
    for keyword, (violates, message) in _KEYWORDS.items():
        if keyword in schema and violates(value, schema[keyword]):
            length = len(value) if isinstance(value, (str, list)) else 0
            choices = " or ".join(map(json.dumps, schema.get("enum", ())))
            words = {"minLength": 0, **schema, "shown": _shown(value), "length": length, "choices": choices}
            return message.format(**words)
    return ""


def _shown(value: object) -> str:
    """Return a value as escaped, truncated JSON. For a list or object, return only its kind."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str) and len(value) > _SHOWN_CHARS:
        return json.dumps(value[:_SHOWN_CHARS]) + "..."
    if isinstance(value, int) and abs(value) >= HUGE:
        return "a number with that many digits"
    return json.dumps(value)


def _suggest(name: str, here: list[str]) -> str | None:
    """Return the field that the author probably meant: from the same section if possible, else from another."""
    import difflib  # only for a rejected document

    name = name[:_KEY_CHARS].lower()
    if close := difflib.get_close_matches(name, here, n=1):
        return close[0]
    by_name = {field.path.rpartition(".")[2]: field.path for field in fields()}
    elsewhere = difflib.get_close_matches(name, by_name, n=1, cutoff=_ELSEWHERE_CUTOFF)
    return by_name[elsewhere[0]] if elsewhere else None


def _suggest_value(schema: Mapping[str, Any], value: object) -> str | None:
    if schema.get("type") == "integer" and isinstance(value, str):
        return value.strip() if value.strip().isdecimal() and len(value) <= _SHOWN_CHARS else None
    if schema.get("type") == "boolean" and isinstance(value, str):
        return {"true": "true", "false": "false"}.get(value.strip().lower())
    return None
