"""The published schemas, for tests of whatever prints JSON."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from jsonschema import Draft202012Validator

from x07_sandbox.reports.schemas import schemas


@cache
def published() -> dict[str, dict[str, Any]]:
    """Return every published schema by the version that its documents name."""
    made: list[dict[str, Any]] = [json.loads(text) for text in schemas().values()]
    return {schema["title"]: schema for schema in made}


@cache
def _validator(version: str) -> Draft202012Validator:
    return Draft202012Validator(published()[version])


def document(data: bytes | str) -> dict[str, Any]:
    """Return the one JSON object in *data*, checked against the published schema of its version."""
    found: dict[str, Any] = json.loads(data)
    _validator(found["schema_version"]).validate(found)
    return found
