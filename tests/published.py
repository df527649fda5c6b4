"""The published schemas, for tests of whatever prints JSON."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import jsonschema

from x07_sandbox.reports.schemas import schemas


@cache
def published() -> dict[str, dict[str, Any]]:
    """Every published schema by the version that its documents name."""
    made: list[dict[str, Any]] = [json.loads(text) for text in schemas().values()]
    return {schema["title"]: schema for schema in made}


def document(data: bytes | str) -> dict[str, Any]:
    """The one JSON object in *data*, which keeps to the schema that is published for the version that it names."""
    found: dict[str, Any] = json.loads(data)
    jsonschema.validate(found, published()[found["schema_version"]])
    return found
