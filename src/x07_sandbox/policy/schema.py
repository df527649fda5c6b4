"""The JSON Schema made from the model, and a description of every field for docs/reference/policy.md."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec

from x07_sandbox.host.decoding import prepared
from x07_sandbox.policy.model import SCHEMA_VERSION, Policy

_REF = "#/$defs/"
_KINDS = {"boolean": "true or false", "integer": "integer", "string": "string", "array": "list"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """Description of one field of the document."""

    path: str
    section: str  # its definition's name in the schema
    kind: str
    bounds: str
    required: bool  # inside its section
    default: object
    maximum: int | None
    minimum: int | None
    doc: str


@cache
def policy_schema() -> dict[str, Any]:
    """Return the document's JSON Schema (draft 2020-12), which allows no unknown fields. Do not modify the result."""
    made = msgspec.json.schema(prepared(Policy))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": SCHEMA_VERSION, **made}


def fields() -> tuple[Field, ...]:
    """Return every field of the document in the model's order; a list is one field."""
    return tuple(_fields("Policy", ""))


def largest(path: str) -> int:
    """Return the maximum of the field at *path*, such as "limits.fds"."""
    return range_of(path)[1]


def range_of(path: str) -> tuple[int, int]:
    """Return the minimum and the maximum of the field at *path*. The field must have both."""
    low, high = next((field.minimum, field.maximum) for field in fields() if field.path == path)
    if low is None or high is None:
        raise ValueError(f"{path} has no range")
    return low, high


def host_fields() -> tuple[Field, ...]:
    """Return the fields of one entry of net.allow_hosts."""
    return tuple(_fields("HostPorts", ""))


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
            maximum=schema.get("maximum"),
            minimum=schema.get("minimum"),
            doc=schema["description"],
        )


def _bounds(schema: Mapping[str, Any]) -> str:
    """Return the range of a value in words, or "" if it has no range."""
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
    """Return the content of schemas/run-os-policy.schema.json."""
    return (json.dumps(policy_schema(), indent=2, ensure_ascii=False) + "\n").encode()
