"""Descriptions of schema violations. Imported only for a rejected document: jsonschema is slow to import."""

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend

from x07_sandbox.policy.problems import HUGE, MISSING, Problem, json_path
from x07_sandbox.policy.schema import fields, policy_schema

_SHOWN_CHARS = 40
_KEY_CHARS = 64  # of a misspelt key: difflib is quadratic
_ELSEWHERE_CUTOFF = 0.9
_TYPES = {
    "object": "an object",
    "array": "a list",
    "string": "a string",
    "integer": "an integer",
    "boolean": "true or false",
}


def schema_problems(document: object) -> Iterator[Problem]:
    """Yield one problem for each place in *document* (a json.loads value) that violates the schema."""
    reported: set[str] = set()
    for error in _VALIDATOR(policy_schema()).iter_errors(document):
        problem = _problem(error)
        # A value of the wrong type violates ranges too; the type comes first in the schema.
        if problem.json_path not in reported:
            reported.add(problem.json_path)
            yield problem


def _required(_validator: Any, required: list[str], instance: object, _schema: object) -> Iterator[ValidationError]:  # noqa: ANN401
    if isinstance(instance, dict):
        yield from (ValidationError(MISSING, path=(name,)) for name in required if name not in instance)


def _closed(_v: Any, _allowed: object, instance: object, schema: Mapping[str, Any]) -> Iterator[ValidationError]:  # noqa: ANN401
    if isinstance(instance, dict):
        unknown = (name for name in instance if name not in schema["properties"])
        yield from (ValidationError("is not a field of the policy", path=(name,)) for name in unknown)


def _is_integer(_checker: object, value: object) -> bool:
    # JSON Schema accepts 1.0 as an integer; upstream's runner and msgspec do not.
    return isinstance(value, int) and not isinstance(value, bool)


_VALIDATOR = extend(  # type: ignore[no-untyped-call]
    Draft202012Validator,
    validators={"required": _required, "additionalProperties": _closed},
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine("integer", _is_integer),
)


def _problem(error: ValidationError) -> Problem:
    place = tuple(error.absolute_path)
    schema: Mapping[str, Any] = error.schema if isinstance(error.schema, dict) else {}
    if error.validator == "additionalProperties":
        name = str(place[-1])
        present = error.instance if isinstance(error.instance, dict) else {}
        missing = [key for key in schema["properties"] if key not in present]
        return Problem(json_path(place), error.message, _suggest(name, missing))
    if error.validator == "required":
        return Problem(json_path(place), error.message)
    value = error.instance
    return Problem(json_path(place), _violation(str(error.validator), schema, value), _suggest_value(schema, value))


def _violation(  # noqa: PLR0911 - one return for each keyword of the schema
    keyword: str, schema: Mapping[str, Any], value: object
) -> str:
    """Return a message: the requirement of the schema, and the value that violates it."""
    match keyword:
        case "type":
            return f"must be {_TYPES[schema['type']]}, not {_shown(value)}"
        case "minimum" | "maximum":
            return f"must be from {schema['minimum']} to {schema['maximum']}, not {_shown(value)}"
        case "minLength" | "maxLength":
            least = schema.get("minLength", 0)
            return f"must have {least} to {schema['maxLength']} characters, not {_length(value)}"
        case "maxItems":
            return f"must have at most {schema['maxItems']} entries, not {_length(value)}"
        case "enum":
            return f"must be {' or '.join(json.dumps(choice) for choice in schema['enum'])}, not {_shown(value)}"
        case "pattern":
            return f"must match {schema['pattern']}, not {_shown(value)}"
        case _:
            return f"violates the schema's rule {keyword!r}"


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
