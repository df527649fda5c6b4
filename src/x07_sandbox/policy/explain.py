"""Descriptions of schema violations. Imported only for a rejected document."""

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from x07_sandbox.policy.problems import HUGE, MISSING, Problem, json_path
from x07_sandbox.policy.schema import fields, policy_schema

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
# For each keyword of the schema, whether a value of the right type violates it.
_VIOLATES: dict[str, Callable[[Any, Any], bool]] = {
    "minimum": lambda value, least: value < least,
    "maximum": lambda value, most: value > most,
    "minLength": lambda value, least: len(value) < least,
    "maxLength": lambda value, most: len(value) > most,
    "maxItems": lambda value, most: len(value) > most,
    "enum": lambda value, choices: value not in choices,
    "pattern": lambda value, pattern: re.search(pattern, value) is None,
}


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
    violated = (keyword for keyword in schema if keyword in _VIOLATES and _VIOLATES[keyword](value, schema[keyword]))
    if keyword := next(violated, None):
        yield Problem(json_path(place), _violation(keyword, schema, value), _suggest_value(schema, value))


def _violation(keyword: str, schema: Mapping[str, Any], value: object) -> str:
    """Return a message: the requirement of the schema, and the value that violates it."""
    match keyword:
        case "minimum" | "maximum":
            return f"must be from {schema['minimum']} to {schema['maximum']}, not {_shown(value)}"
        case "minLength" | "maxLength":
            least = schema.get("minLength", 0)
            return f"must have {least} to {schema['maxLength']} characters, not {_length(value)}"
        case "maxItems":
            return f"must have at most {schema['maxItems']} entries, not {_length(value)}"
        case "enum":
            return f"must be {' or '.join(json.dumps(choice) for choice in schema['enum'])}, not {_shown(value)}"
        case _:
            return f"must match {schema['pattern']}, not {_shown(value)}"


def _length(value: object) -> int:
    return len(value) if isinstance(value, (str, list)) else 0


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
