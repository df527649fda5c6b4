"""The published JSON Schemas of X07's documents and of our own reports, from the types that make them.

``python -m x07_sandbox.reports.schemas FOLDER`` writes the files; a unit test holds them to this.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

import msgspec

from x07_sandbox.reports import attestation, doctor, failure, init, policy_init, runner, wrapped
from x07_sandbox.runs import prune

_REF: Final = "#/$defs/{name}"
_RUNNER: Final = (runner.CompileRunReport, runner.RunOsReport)


def schemas() -> dict[str, str]:
    """Each file's name and text."""
    return {
        "x07-os-runner.report.schema.json": _text(runner.SCHEMA, _any_of(_RUNNER)),
        "x07-run.report.schema.json": _text(wrapped.SCHEMA, _wrapped()),
        "x07-runtime.attest.schema.json": _text(attestation.SCHEMA, _any_of((attestation.Attestation,))),
        "x07-policy-init.report.schema.json": _text(policy_init.SCHEMA, _any_of((policy_init.PolicyInitReport,))),
        "init.report.schema.json": _text(init.SCHEMA, _any_of((init.InitReport,))),
        "failure.schema.json": _text(failure.SCHEMA, _any_of((failure.FailureReport,))),
        "doctor.schema.json": _text(doctor.SCHEMA, _any_of((doctor.DoctorReport,))),
        "prune.schema.json": _text(prune.SCHEMA, _any_of((prune.PruneReport,))),
    }


def _any_of(types: tuple[type[msgspec.Struct], ...]) -> dict[str, Any]:
    refs, definitions = msgspec.json.schema_components(types, ref_template=_REF)
    top = refs[0] if len(refs) == 1 else {"anyOf": list(refs)}
    return {**top, "$defs": {name: _closed(schema) for name, schema in definitions.items()}}


def _wrapped() -> dict[str, Any]:
    made = _any_of((wrapped.WrappedReport, *_RUNNER))
    made["$defs"]["WrappedReport"]["properties"]["report"] = {"anyOf": made.pop("anyOf")[1:]}
    return {"$ref": _REF.format(name="WrappedReport"), **made}


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The same, with its version required: the types have it as a default, and the document always has it."""
    if "schema_version" in schema.get("properties", ()):
        schema = schema | {"required": ["schema_version", *schema.get("required", ())]}
        schema["properties"]["schema_version"].pop("default", None)
    return schema


def _text(name: str, schema: dict[str, Any]) -> str:
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": name, "title": name}
    return json.dumps(head | schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for file_name, text in schemas().items():
        (Path(sys.argv[1]) / file_name).write_text(text, encoding="utf-8")
