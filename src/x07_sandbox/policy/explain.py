"""Every place where a document breaks the schema, in words. Imported after a refusal only: jsonschema is slow."""

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend

from x07_sandbox.policy.problems import HUGE, MISSING, Problem, json_path
from x07_sandbox.policy.schema import fields, policy_schema

_SHOWN_CHARS = 40
_KEY_CHARS = 64  # of a misspelt key; difflib's work grows with the square
_ELSEWHERE_CUTOFF = 0.9
_TYPES = {
    "object": "an object",
    "array": "a list",
    "string": "a text",
    "integer": "a whole number",
    "boolean": "true or false",
}


def schema_problems(document: object) -> Iterator[Problem]:
    """Every place in *document* (as json.loads gives it) that breaks the schema; a place is named once."""
    told: set[str] = set()
    for error in _VALIDATOR(policy_schema()).iter_errors(document):
        problem = _problem(error)
        # A value of the wrong type breaks ranges too; the type comes first in the schema and says enough.
        if problem.json_path not in told:
            told.add(problem.json_path)
            yield problem


def _required(_validator: Any, required: list[str], instance: object, _schema: object) -> Iterator[ValidationError]:  # noqa: ANN401
    if isinstance(instance, dict):
        yield from (ValidationError(MISSING, path=(name,)) for name in required if name not in instance)


def _closed(_v: Any, _allowed: object, instance: object, schema: Mapping[str, Any]) -> Iterator[ValidationError]:  # noqa: ANN401
    if isinstance(instance, dict):
        unknown = (name for name in instance if name not in schema["properties"])
        yield from (ValidationError("is no field of the policy", path=(name,)) for name in unknown)


def _is_integer(_checker: object, value: object) -> bool:
    # JSON Schema counts 1.0 as an integer, upstream's runner and msgspec do not; bool is an int in Python only.
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
    return Problem(json_path(place), _wish(str(error.validator), schema, value), _suggest_value(schema, value))


def _wish(  # noqa: PLR0911 - one return for each keyword of the schema
    keyword: str, schema: Mapping[str, Any], value: object
) -> str:
    """What the schema asks of a value, and what stands there."""
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
            return f"must match {schema['pattern']}, unlike {_shown(value)}"
        case _:
            return f"breaks the schema's rule {keyword!r}"


def _length(value: object) -> int:
    return len(value) if isinstance(value, (str, list)) else 0


def _shown(value: object) -> str:
    """A value as JSON, escaped and cut; a container by its kind only."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str) and len(value) > _SHOWN_CHARS:
        return json.dumps(value[:_SHOWN_CHARS]) + "..."
    if isinstance(value, int) and abs(value) >= HUGE:
        return "a number of so many digits"
    return json.dumps(value)


def _suggest(name: str, here: list[str]) -> str | None:
    """The field that was probably meant: one of the same section, else one that stands elsewhere."""
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
