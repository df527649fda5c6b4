"""The result as JSON, and the schema that is published for it."""

from __future__ import annotations

import json

import msgspec

from x07_sandbox.runs.result import SCHEMA, Result


def render_json(result: Result) -> bytes:
    """One JSON object and a line end."""
    # ASCII only: everything else, control characters of a guest's text above all, is escaped, also on a terminal.
    return json.dumps(msgspec.to_builtins(result), indent=2).encode("ascii") + b"\n"


def result_schema() -> str:
    """JSON Schema (2020-12) of the result, as `schemas/result.schema.json` holds it."""
    schema = msgspec.json.schema(Result)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA, "title": "x07-sandbox result"}
    return json.dumps(head | schema, indent=2, ensure_ascii=False) + "\n"
